//! Panels: how the CPU backend packs weights in main memory, said here because a GPU that streams them reads the same
//! bytes.
//!
//! A panel holds the same `R` rows of one matrix, block column after block column: for each block the fields of the
//! file's block in the order of [`fields`], each field transposed so that the same unit (1, 2 or 4 bytes) of all `R`
//! rows lies together. Nothing is re-encoded, so a panel has the bytes of its rows (the last panel is padded with zero
//! rows), and one vector of `4 * R` bytes holds 4 consecutive codes of `R` rows.

use crate::TensorType;
use std::ops::Range;
use std::sync::Arc;

/// A field of a block: where it lies in the file's block, and the unit in which rows are interleaved.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// First byte in the file's block.
    pub offset: usize,
    /// Bytes: whole units.
    pub len: usize,
    /// Bytes of a unit: 1, 2 or 4.
    pub unit: usize,
}

const fn field(offset: usize, len: usize, unit: usize) -> Field {
    Field { offset, len, unit }
}

/// Fields of a block in packed order: scales first, then codes. A float is a block of its own.
///
/// # Panics
/// For a type that weights do not have.
pub fn fields(ty: TensorType) -> &'static [Field] {
    use TensorType::*;
    const { assert!(cfg!(target_endian = "little"), "packed layouts are little-endian, like the file") };
    match ty {
        F32 => const { &[field(0, 4, 4)] },
        F16 | BF16 => const { &[field(0, 2, 2)] },
        Q4_0 | IQ4_NL => const { &[field(0, 2, 2), field(2, 16, 4)] },
        Q4_1 => const { &[field(0, 2, 2), field(2, 2, 2), field(4, 16, 4)] },
        Q5_0 => const { &[field(0, 2, 2), field(2, 4, 4), field(6, 16, 4)] },
        Q5_1 => const { &[field(0, 2, 2), field(2, 2, 2), field(4, 4, 4), field(8, 16, 4)] },
        Q8_0 => const { &[field(0, 2, 2), field(2, 32, 4)] },
        Q2_K => const { &[field(80, 2, 2), field(82, 2, 2), field(0, 16, 1), field(16, 64, 4)] },
        Q3_K => const { &[field(108, 2, 2), field(96, 12, 1), field(0, 32, 4), field(32, 64, 4)] },
        Q4_K => const { &[field(0, 2, 2), field(2, 2, 2), field(4, 12, 1), field(16, 128, 4)] },
        Q5_K => const { &[field(0, 2, 2), field(2, 2, 2), field(4, 12, 1), field(16, 32, 4), field(48, 128, 4)] },
        Q6_K => const { &[field(208, 2, 2), field(192, 16, 1), field(128, 64, 4), field(0, 128, 4)] },
        IQ4_XS => const { &[field(0, 2, 2), field(2, 2, 2), field(4, 4, 1), field(8, 128, 4)] },
        MXFP4 => const { &[field(0, 1, 1), field(1, 16, 4)] },
        _ => panic!("no packed layout for tensor type {ty}: the model reader refuses it"),
    }
}

/// Memory that holds panels.
pub trait PanelMemory: Send + Sync {
    /// The panels of one matrix, one after the other, then maybe padding.
    fn bytes(&self) -> &[u8];
    /// Addresses of what is in use of the mapping that they lie in, which lives as long as they do: whole pages, which
    /// can be pinned together, the same for all panels in them. Others may use other parts.
    fn mapping(&self) -> Range<usize>;
}

/// A matrix `[n_rows, n_cols]` in panels.
#[derive(Clone)]
pub struct Panels {
    /// Type.
    pub ty: TensorType,
    /// Rows.
    pub n_rows: usize,
    /// Columns.
    pub n_cols: usize,
    /// Rows of a panel, 8 or 16.
    pub panel_rows: usize,
    /// Where the panels are.
    pub memory: Arc<dyn PanelMemory>,
}

impl Panels {
    /// Number of panels.
    pub fn n_panels(&self) -> usize {
        self.n_rows.div_ceil(self.panel_rows)
    }

    /// Bytes of one panel.
    pub fn panel_bytes(&self) -> usize {
        self.panel_rows * self.ty.row_bytes(self.n_cols).expect("rows are whole blocks: checked when the file was read")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_type::TYPES;

    #[test]
    fn fields_cover_every_byte_of_a_block_once() {
        for row in TYPES.iter().filter(|row| row.ty.is_supported()) {
            let mut seen = vec![0; row.block_bytes];
            for f in fields(row.ty) {
                assert!(f.len.is_multiple_of(f.unit), "{}", row.name);
                seen[f.offset..f.offset + f.len].iter_mut().for_each(|n| *n += 1);
            }
            assert!(seen.iter().all(|n| *n == 1), "{}: {seen:?}", row.name);
        }
    }
}
