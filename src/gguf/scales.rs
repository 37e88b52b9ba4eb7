//! The scales inside of tensors: where each type keeps them, and whether they are finite numbers.

use super::File;
use tandem_spec::{TensorSource, TensorType};

/// Byte offsets of the halves that scale a block of `ty`; `None` for types whose scales are not halves.
fn half_scales(ty: TensorType) -> Option<&'static [usize]> {
    use TensorType::*;
    Some(match ty {
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS | Q1_0 | Q2_0 | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ1_S => &[0],
        Q4_1 | Q5_1 | Q4_K | Q5_K | Q8_1 => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        TQ1_0 => &[52],
        TQ2_0 => &[64],
        F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | Q8_K | IQ1_M | MXFP4 | NVFP4 => return None,
    })
}

/// Whether every scale (for plain floats: every value) of the block is finite. Types without scales that can be
/// anything else are always finite.
fn block_is_finite(ty: TensorType, block: &[u8]) -> bool {
    // All exponent bits set means infinite or NaN in each of these formats.
    let half = |at: usize| block[at + 1] & 0x7c != 0x7c;
    match ty {
        TensorType::F32 => block[3] & 0x7f != 0x7f || block[2] & 0x80 == 0,
        TensorType::F64 => block[7] & 0x7f != 0x7f || block[6] & 0xf0 != 0xf0,
        TensorType::BF16 => block[1] & 0x7f != 0x7f || block[0] & 0x80 == 0,
        TensorType::F16 => half(0),
        TensorType::Q8_K => block_is_finite(TensorType::F32, &block[..4]),
        // The exponent byte 255 stands for NaN.
        TensorType::MXFP4 => block[0] != 255,
        other => half_scales(other).is_none_or(|offsets| offsets.iter().all(|at| half(*at))),
    }
}

impl File {
    /// Index of the first block of tensor number `tensor` with a scale that is infinite or NaN.
    pub fn non_finite_block(&self, tensor: usize) -> Option<usize> {
        let ty = self.tensors()[tensor].ty;
        self.bytes(tensor).chunks_exact(ty.row().block_bytes).position(|block| !block_is_finite(ty, block))
    }
}

#[cfg(test)]
mod tests {
    use super::block_is_finite;
    use tandem_spec::TensorType::*;

    #[test]
    fn an_infinite_scale_is_found_at_its_place_in_every_supported_type() {
        let inf = half::f16::INFINITY.to_le_bytes();
        let nan = half::f16::NAN.to_le_bytes();
        for row in tandem_spec::tensor_type::TYPES.iter().filter(|row| row.ty.is_supported()) {
            // The decoder says which bytes matter: a block whose decoded values are not finite must be found, and a
            // block of codes that are all ones but with scales of one must not.
            for at in 0..row.block_bytes.saturating_sub(1) {
                for scale in [inf, nan] {
                    let mut block = vec![0x11; row.block_bytes];
                    block[at..at + 2].copy_from_slice(&scale);
                    let mut values = vec![0.0; row.block_len];
                    row.ty.decode(&block, &mut values);
                    let finite = values.iter().all(|v| v.is_finite());
                    assert_eq!(block_is_finite(row.ty, &block), finite, "{} with {scale:?} at byte {at}", row.name);
                }
            }
        }
        assert!(!block_is_finite(F32, &f32::NAN.to_le_bytes()) && block_is_finite(F32, &f32::MAX.to_le_bytes()));
        assert!(!block_is_finite(F64, &f64::INFINITY.to_le_bytes()) && block_is_finite(F64, &f64::MAX.to_le_bytes()));
        assert!(!block_is_finite(BF16, &[0x80, 0x7f]) && block_is_finite(BF16, &[0x7f, 0x7f]));
        assert!(!block_is_finite(MXFP4, &[255; 17]) && block_is_finite(MXFP4, &[254; 17]));
    }
}
