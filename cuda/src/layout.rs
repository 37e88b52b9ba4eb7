//! How tensors lie in device memory: the bytes of the file, lossless and as many, sorted into planes so that a
//! lane loads 16 aligned bytes. Pure functions, for the planner too.
//!
//! A tensor of `n` blocks (rows one after the other, whole blocks each) is the concatenation of its type's
//! planes, each `n` times the plane's bytes per block. Within a block, elements are handled in units of 32:
//!
//! - `low4`, 16 bytes a unit: byte `j` holds element `j` in its low and element `j + 16` in its high nibble.
//! - `low2`, 8 bytes a unit: byte `4 h + b`, bits `2 w..2 w + 2` hold element `16 h + 4 w + b`.
//! - `high1`, 4 bytes a unit: byte `b`, bit `w` holds element `4 w + b`.
//! - Q8_0: the first 16 codes of every block, then the last 16 of every block.
//! - scales: as in the file, but Q4_K/Q5_K scales become eight bytes `sc | (mn & 3) << 6`, then eight nibbles
//!   `mn >> 2` (even sub-block low), after d and dmin; Q3_K scales become eight bytes of the low nibbles of
//!   scales `2 u` (low) and `2 u + 1` (high), then eight nibbles `hi2(2 u) | hi2(2 u + 1) << 2`.

use crate::arena::{Range, Ranges};
use tandem_spec::{DeltaNetShape, Linear, Moe, TensorType, Weight};

/// Bytes per block of each plane, in order; they add up to the bytes of the block in the file.
///
/// # Panics
/// For a type that the backends do not multiply with.
pub const fn planes(ty: TensorType) -> &'static [usize] {
    use TensorType::*;
    match ty {
        F32 => &[4],
        F16 | BF16 => &[2],
        Q4_0 | IQ4_NL => &[16, 2],
        Q4_1 => &[16, 4],
        Q5_0 => &[16, 4, 2],
        Q5_1 => &[16, 4, 4],
        Q8_0 => &[16, 16, 2],
        Q2_K => &[64, 16, 4],
        Q3_K => &[64, 32, 12, 2],
        Q4_K => &[128, 16],
        Q5_K => &[128, 32, 16],
        Q6_K => &[128, 64, 16, 2],
        IQ4_XS => &[128, 8],
        MXFP4 => &[16, 1],
        _ => panic!("not a type that the backends multiply with"),
    }
}

/// Bytes of a weight on the device: those of the file. Ranges in an arena start at multiples of
/// [`crate::arena::ALIGN`].
pub fn bytes(n_rows: usize, n_cols: usize, ty: TensorType) -> usize {
    n_rows * ty.row_bytes(n_cols).expect("rows are whole blocks: checked when the file was read")
}

/// As [`bytes`].
pub fn weight_bytes(weight: &Weight) -> usize {
    bytes(weight.n_rows(), weight.n_cols, weight.ty)
}

/// The slot of a routed expert: its three matrices, each with planes of its own, at the same places in every slot of a
/// block. Kernels find an expert through a table of slot addresses, so that slots may lie anywhere.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertSlot {
    /// Gate `[n_ff, n_embd]`, up `[n_ff, n_embd]` and down `[n_embd, n_ff]` within the slot.
    pub parts: [Range; 3],
    /// Bytes from one slot to the next.
    pub bytes: usize,
}

impl ExpertSlot {
    /// The slot of an expert of a block, from the types of its weights alone.
    pub fn new<W>(block: &Moe<W>, ty: impl Fn(&W) -> TensorType) -> Self {
        let (n_embd, n_ff) = (block.shape.n_embd, block.shape.n_ff);
        let mut ranges = Ranges::default();
        let mut part = |l: &Linear<W>, rows, cols| ranges.take(bytes(rows, cols, ty(&l.weight)));
        let parts = [
            part(&block.ffn_gate_exps, n_ff, n_embd),
            part(&block.ffn_up_exps, n_ff, n_embd),
            part(&block.ffn_down_exps, n_embd, n_ff),
        ];
        Self { parts, bytes: ranges.total() }
    }
}

/// Elements of the convolution state of one slot: a ring of the last `conv_kernel` inputs `[conv_kernel, n_channels]`
/// f32, that of position `p` at entry `p % conv_kernel`. One more than the convolution looks back, so that the
/// blocks of one launch may read the old inputs while one writes the new.
pub fn ring_len(shape: &DeltaNetShape) -> usize {
    shape.conv_kernel * shape.n_channels()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_hold_exactly_the_bytes_of_the_file() {
        for row in tandem_spec::tensor_type::TYPES.iter().filter(|row| row.ty.is_supported()) {
            assert_eq!(planes(row.ty).iter().sum::<usize>(), row.block_bytes, "{}", row.name);
        }
    }
}
