//! ggml tensor types: one row each. A tensor row of `n` elements is cut into blocks of
//! `block_len` elements, each stored in `block_bytes` bytes, without padding between rows.

use crate::decode::{self, BlockDecoder};

/// A ggml tensor type, by its id in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[allow(non_camel_case_types, missing_docs)]
#[repr(u32)]
pub enum TensorType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// Geometry of one type.
pub struct TypeRow {
    /// The type.
    pub ty: TensorType,
    /// Its name as ggml writes it.
    pub name: &'static str,
    /// Elements per block.
    pub block_len: usize,
    /// Bytes per block.
    pub block_bytes: usize,
    /// Decoder of one block; present for the types that weights may have.
    pub decode: Option<BlockDecoder>,
}

/// A type that weights may have.
const fn weight(
    ty: TensorType,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    decode: BlockDecoder,
) -> TypeRow {
    TypeRow { ty, name, block_len, block_bytes, decode: Some(decode) }
}

/// A type whose size is known, so that a file that has it can be inspected, and no more.
const fn other(ty: TensorType, name: &'static str, block_len: usize, block_bytes: usize) -> TypeRow {
    TypeRow { ty, name, block_len, block_bytes, decode: None }
}

/// Every type that a GGUF file may name.
pub static TYPES: &[TypeRow] = {
    use TensorType::*;
    &[
        weight(F32, "F32", 1, 4, decode::f32),
        weight(F16, "F16", 1, 2, decode::f16),
        weight(Q4_0, "Q4_0", 32, 18, decode::q4_0),
        weight(Q4_1, "Q4_1", 32, 20, decode::q4_1),
        weight(Q5_0, "Q5_0", 32, 22, decode::q5_0),
        weight(Q5_1, "Q5_1", 32, 24, decode::q5_1),
        weight(Q8_0, "Q8_0", 32, 34, decode::q8_0),
        other(Q8_1, "Q8_1", 32, 36),
        weight(Q2_K, "Q2_K", 256, 84, decode::q2_k),
        weight(Q3_K, "Q3_K", 256, 110, decode::q3_k),
        weight(Q4_K, "Q4_K", 256, 144, decode::q4_k),
        weight(Q5_K, "Q5_K", 256, 176, decode::q5_k),
        weight(Q6_K, "Q6_K", 256, 210, decode::q6_k),
        other(Q8_K, "Q8_K", 256, 292),
        other(IQ2_XXS, "IQ2_XXS", 256, 66),
        other(IQ2_XS, "IQ2_XS", 256, 74),
        other(IQ3_XXS, "IQ3_XXS", 256, 98),
        other(IQ1_S, "IQ1_S", 256, 50),
        weight(IQ4_NL, "IQ4_NL", 32, 18, decode::iq4_nl),
        other(IQ3_S, "IQ3_S", 256, 110),
        other(IQ2_S, "IQ2_S", 256, 82),
        weight(IQ4_XS, "IQ4_XS", 256, 136, decode::iq4_xs),
        other(I8, "I8", 1, 1),
        other(I16, "I16", 1, 2),
        other(I32, "I32", 1, 4),
        other(I64, "I64", 1, 8),
        other(F64, "F64", 1, 8),
        other(IQ1_M, "IQ1_M", 256, 56),
        weight(BF16, "BF16", 1, 2, decode::bf16),
        other(TQ1_0, "TQ1_0", 256, 54),
        other(TQ2_0, "TQ2_0", 256, 66),
        weight(MXFP4, "MXFP4", 32, 17, decode::mxfp4),
        other(NVFP4, "NVFP4", 64, 36),
        other(Q1_0, "Q1_0", 128, 18),
        other(Q2_0, "Q2_0", 64, 18),
    ]
};

impl TensorType {
    /// The type with this GGUF id, or `None` for an id that is unknown or was removed.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.ty as u32 == id).map(|row| row.ty)
    }

    /// Geometry and name.
    pub fn row(self) -> &'static TypeRow {
        TYPES.iter().find(|row| row.ty == self).expect("every variant has a row in TYPES")
    }

    /// Name as ggml writes it.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Bytes of a row of `n` elements; `None` if `n` is not a whole number of blocks or overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        let row = self.row();
        if !n.is_multiple_of(row.block_len) {
            return None;
        }
        (n / row.block_len).checked_mul(row.block_bytes)
    }

    /// Whether the backends multiply with weights of this type.
    pub fn is_supported(self) -> bool {
        self.row().decode.is_some()
    }

    /// Decodes whole blocks: `out` gets the exact values rounded to f32.
    ///
    /// # Panics
    /// If the type is not supported, or if `bytes` and `out` are not the same whole number of blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let row = self.row();
        let decode = row.decode.unwrap_or_else(|| panic!("no decoder for {self}"));
        assert_eq!(Some(bytes.len()), self.row_bytes(out.len()), "{self}: bytes of {} elements", out.len());
        for (block, x) in bytes.chunks_exact(row.block_bytes).zip(out.chunks_exact_mut(row.block_len)) {
            decode(block, x);
        }
    }

    /// Whether values are stored in blocks with a common scale (as opposed to plain floats or integers).
    pub fn is_quantised(self) -> bool {
        self.row().block_len > 1
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden blocks (all zeros, all ones, subnormal scales, random bits) of every decodable type, from the
    /// independent decoders in `scripts/reference`: every value equal, bit by bit.
    #[test]
    fn decodes_golden_blocks_exactly() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/");
        let index = std::fs::read_to_string(format!("{folder}dequantize.json")).expect("dequantize.json");
        let index: serde_json::Value = serde_json::from_str(&index).expect("dequantize.json is JSON");
        let data = std::fs::read(format!("{folder}dequantize.bin")).expect("dequantize.bin");
        let number = |v: &serde_json::Value| v.as_u64().expect("a number") as usize;
        let mut seen = Vec::new();
        for entry in index["types"].as_array().expect("types") {
            let ty = TensorType::from_id(number(&entry["type"]) as u32).expect("a known type");
            assert_eq!(entry["name"].as_str(), Some(ty.name()));
            assert_eq!(number(&entry["block_size"]), ty.row().block_len, "{ty}");
            assert_eq!(number(&entry["type_size"]), ty.row().block_bytes, "{ty}");
            if !ty.is_supported() {
                continue;
            }
            let at = number(&entry["raw"]["offset"]);
            let raw = &data[at..at + number(&entry["raw"]["bytes"])];
            let at = number(&entry["values"]["offset"]);
            let n = number(&entry["blocks"]) * ty.row().block_len;
            let want = data[at..at + 4 * n].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
            let mut got = vec![f32::NAN; n];
            ty.decode(raw, &mut got);
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let want = f32::from_bits(want);
                assert!(*got == want, "{ty} element {i}: {got:e}, expected {want:e}");
            }
            seen.push(ty);
        }
        let missing: Vec<_> = TYPES.iter().filter(|r| r.decode.is_some() && !seen.contains(&r.ty)).collect();
        assert_eq!(missing.iter().map(|r| r.name).collect::<Vec<_>>(), ["F32"], "types without a golden block");
    }

    #[test]
    fn row_bytes_wants_whole_blocks() {
        assert_eq!(TensorType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(TensorType::Q4_K.row_bytes(511), None);
        assert_eq!(TensorType::F32.row_bytes(usize::MAX / 2), None);
    }
}
