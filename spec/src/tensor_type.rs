//! ggml tensor types: one row each. A tensor row of `n` elements is cut into blocks of
//! `block_len` elements, each stored in `block_bytes` bytes, without padding between rows.

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
    /// Whether the backends multiply with weights of this type.
    pub supported: bool,
}

const fn row(ty: TensorType, name: &'static str, block_len: usize, block_bytes: usize, supported: bool) -> TypeRow {
    TypeRow { ty, name, block_len, block_bytes, supported }
}

/// Every type that a GGUF file may name.
pub static TYPES: &[TypeRow] = {
    use TensorType::*;
    &[
        row(F32, "F32", 1, 4, true),
        row(F16, "F16", 1, 2, true),
        row(Q4_0, "Q4_0", 32, 18, true),
        row(Q4_1, "Q4_1", 32, 20, true),
        row(Q5_0, "Q5_0", 32, 22, true),
        row(Q5_1, "Q5_1", 32, 24, true),
        row(Q8_0, "Q8_0", 32, 34, true),
        row(Q8_1, "Q8_1", 32, 36, false),
        row(Q2_K, "Q2_K", 256, 84, true),
        row(Q3_K, "Q3_K", 256, 110, true),
        row(Q4_K, "Q4_K", 256, 144, true),
        row(Q5_K, "Q5_K", 256, 176, true),
        row(Q6_K, "Q6_K", 256, 210, true),
        row(Q8_K, "Q8_K", 256, 292, false),
        row(IQ2_XXS, "IQ2_XXS", 256, 66, false),
        row(IQ2_XS, "IQ2_XS", 256, 74, false),
        row(IQ3_XXS, "IQ3_XXS", 256, 98, false),
        row(IQ1_S, "IQ1_S", 256, 50, false),
        row(IQ4_NL, "IQ4_NL", 32, 18, true),
        row(IQ3_S, "IQ3_S", 256, 110, false),
        row(IQ2_S, "IQ2_S", 256, 82, false),
        row(IQ4_XS, "IQ4_XS", 256, 136, true),
        row(I8, "I8", 1, 1, false),
        row(I16, "I16", 1, 2, false),
        row(I32, "I32", 1, 4, false),
        row(I64, "I64", 1, 8, false),
        row(F64, "F64", 1, 8, false),
        row(IQ1_M, "IQ1_M", 256, 56, false),
        row(BF16, "BF16", 1, 2, true),
        row(TQ1_0, "TQ1_0", 256, 54, false),
        row(TQ2_0, "TQ2_0", 256, 66, false),
        row(MXFP4, "MXFP4", 32, 17, true),
        row(NVFP4, "NVFP4", 64, 36, false),
        row(Q1_0, "Q1_0", 128, 18, false),
        row(Q2_0, "Q2_0", 64, 18, false),
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
        self.row().supported
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
