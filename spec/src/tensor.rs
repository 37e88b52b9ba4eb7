//! Tensors as a file states them, and weights as a block uses them.
//!
//! A weight is a gather of rows of one file tensor. Files store some projections fused or
//! interleaved (`attn_qkv` of dense models, `ffn_gate_up_exps`, the old `ssm_in`, `ssm_ba`); the
//! model description undoes that with row ranges, so that backends see one canonical layout. A share of a block
//! ([`crate::Block::share`]) is made of weights with fewer rows or columns, so that backends need not know of shares.

use crate::TensorType;
use std::ops::Range;

/// One tensor of a file: name, type and shape. The bytes come from a [`TensorSource`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Tensor {
    /// Name in the file, such as `blk.3.attn_q.weight`.
    pub name: String,
    /// Storage type.
    pub ty: TensorType,
    /// Shape in ggml order: `ne[0]` is contiguous. One to four entries, each at least 1.
    pub ne: Vec<usize>,
}

impl Tensor {
    /// Elements of a row (`ne[0]`).
    pub fn n_cols(&self) -> usize {
        self.ne[0]
    }

    /// Rows: the product of all dimensions but the first.
    pub fn n_rows(&self) -> usize {
        self.ne[1..].iter().product()
    }

    /// Bytes of one row. The reader has checked that rows are whole blocks.
    pub fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.n_cols()).expect("rows are whole blocks: checked when the file was read")
    }

    /// Bytes of the tensor.
    pub fn n_bytes(&self) -> usize {
        self.n_rows() * self.row_bytes()
    }
}

/// Where the bytes of the file's tensors come from.
pub trait TensorSource: Sync {
    /// All bytes of tensor number `tensor` (index in the table that [`Weight::tensor`] counts in).
    fn bytes(&self, tensor: usize) -> &[u8];
}

/// Rows of one file tensor, whole or the same columns of each, in the order in which a block wants them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Weight {
    /// Name of the file tensor.
    pub name: String,
    /// Index of the file tensor.
    pub tensor: usize,
    /// Storage type.
    pub ty: TensorType,
    /// Elements of a row. A vector is one row of all its elements; a slice of a vector (part of a fused bias) is
    /// rows of one element. Decoded, both are the elements in order.
    pub n_cols: usize,
    /// First of these elements in a row of the file tensor: a whole number of blocks.
    pub first_col: usize,
    /// Elements of a row of the file tensor.
    pub file_cols: usize,
    /// Rows of the file tensor, concatenated in this order; adjacent ranges are merged.
    pub rows: Vec<Range<usize>>,
}

impl Weight {
    /// All rows of `tensor`, which has index `index`.
    pub fn whole(index: usize, tensor: &Tensor) -> Self {
        Self::new(tensor.name.clone(), index, tensor.ty, tensor.n_rows(), tensor.n_cols())
    }

    /// All of the tensor `name` `[n_rows, n_cols]`, which has index `tensor`.
    pub fn new(name: String, tensor: usize, ty: TensorType, n_rows: usize, n_cols: usize) -> Self {
        let rows = std::iter::once(0..n_rows).collect();
        Self { name, tensor, ty, n_cols, first_col: 0, file_cols: n_cols, rows }
    }

    /// The same tensor's rows, replaced by `rows` (empty ranges dropped, adjacent ones merged).
    pub fn with_rows(mut self, rows: impl IntoIterator<Item = Range<usize>>) -> Self {
        self.rows.clear();
        for range in rows.into_iter().filter(|r| !r.is_empty()) {
            match self.rows.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => self.rows.push(range),
            }
        }
        self
    }

    /// Rows `rows` of this weight, counted in its own order.
    pub fn row_range(&self, rows: Range<usize>) -> Self {
        let mut first = 0;
        let part = |range: &Range<usize>| {
            let at = |row: usize| range.start + row.saturating_sub(first).min(range.len());
            let part = at(rows.start)..at(rows.end);
            first += range.len();
            part
        };
        self.clone().with_rows(self.rows.iter().map(part).collect::<Vec<_>>())
    }

    /// Columns `cols` of this weight: whole blocks.
    ///
    /// # Panics
    /// If the weight has no such columns.
    pub fn col_range(&self, cols: Range<usize>) -> Self {
        assert!(cols.end <= self.n_cols, "columns {cols:?} of {}, which has {}", self.name, self.n_cols);
        assert!(cols.start.is_multiple_of(self.ty.row().block_len), "columns {cols:?} of {} cut a block", self.name);
        Self { n_cols: cols.len(), first_col: self.first_col + cols.start, ..self.clone() }
    }

    /// Elements `range` of a vector, which is one row or rows of one element.
    pub fn element_range(&self, range: Range<usize>) -> Self {
        if self.n_cols == 1 { self.row_range(range) } else { self.col_range(range) }
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.rows.iter().map(|r| r.len()).sum()
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.n_cols).expect("rows are whole blocks: checked when the file was read")
    }

    /// Bytes of all rows as stored in the file.
    pub fn n_bytes(&self) -> usize {
        self.n_rows() * self.row_bytes()
    }

    /// The runs of bytes that hold the rows, in order; one run if the rows are whole and contiguous.
    pub fn runs<'a>(&'a self, source: &'a dyn TensorSource) -> impl Iterator<Item = &'a [u8]> {
        let is_whole = self.n_cols == self.file_cols;
        let cut = move |r: &Range<usize>| {
            let step = if is_whole { r.len() } else { 1 };
            r.clone().step_by(step.max(1)).map(move |first| first..first + step)
        };
        self.rows.iter().flat_map(cut).map(move |rows| self.file_rows(source, rows))
    }

    /// The bytes of `rows` of the file tensor: several only of whole rows.
    fn file_rows<'a>(&self, source: &'a dyn TensorSource, rows: Range<usize>) -> &'a [u8] {
        let bytes = |n: usize| self.ty.row_bytes(n).expect("whole blocks: checked when the file was read");
        let start = rows.start * bytes(self.file_cols) + bytes(self.first_col);
        &source.bytes(self.tensor)[start..][..rows.len() * self.row_bytes()]
    }

    /// The bytes of row `row` of this weight.
    ///
    /// # Panics
    /// If the weight has no such row.
    pub fn row<'a>(&self, source: &'a dyn TensorSource, row: usize) -> &'a [u8] {
        let mut left = row;
        for range in &self.rows {
            if left < range.len() {
                return self.file_rows(source, range.start + left..range.start + left + 1);
            }
            left -= range.len();
        }
        panic!("row {row} of {}, which has {}", self.name, self.n_rows());
    }

    /// Copies bytes `at ..` of the weight's rows, one after the other, into `out`.
    ///
    /// # Panics
    /// If the weight has fewer bytes.
    pub fn read(&self, source: &dyn TensorSource, at: usize, mut out: &mut [u8]) {
        let (row_bytes, is_whole) = (self.row_bytes(), self.n_cols == self.file_cols);
        let mut skip = at;
        for range in &self.rows {
            if skip >= range.len() * row_bytes {
                skip -= range.len() * row_bytes;
                continue;
            }
            let mut row = range.start + skip / row_bytes;
            skip %= row_bytes;
            while row < range.end && !out.is_empty() {
                let rows = if is_whole { range.end - row } else { 1 };
                let bytes = &self.file_rows(source, row..row + rows)[skip..];
                let (now, rest) = out.split_at_mut(bytes.len().min(out.len()));
                now.copy_from_slice(&bytes[..now.len()]);
                (out, row, skip) = (rest, row + rows, 0);
            }
        }
        assert!(out.is_empty(), "{} bytes beyond the end of {}", out.len(), self.name);
    }

    /// Decodes `rows` of this weight into `out` `[rows.len(), n_cols]`.
    ///
    /// # Panics
    /// If the weight lacks some of the rows, or `out` has another length.
    pub fn decode_rows(&self, source: &dyn TensorSource, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.n_cols, "elements of {} rows of {}", rows.len(), self.name);
        for (row, out) in rows.zip(out.chunks_exact_mut(self.n_cols.max(1))) {
            self.ty.decode(self.row(source, row), out);
        }
    }

    /// Decodes all rows: `[n_rows, n_cols]`.
    pub fn decode(&self, source: &dyn TensorSource) -> Vec<f32> {
        let mut out = vec![0.0; self.n_rows() * self.n_cols];
        self.decode_rows(source, 0..self.n_rows(), &mut out);
        out
    }
}

/// A projection `y = scale * (weight . x) + bias`.
#[derive(Clone, Debug)]
pub struct Linear<W> {
    /// `[n_out, n_in]`, or `[n_experts * n_out, n_in]` for a stack of experts.
    pub weight: W,
    /// `[1]`, or `[n_experts]` for a stack: multiplies the product before the bias.
    pub scale: Option<W>,
    /// `[n_out]`.
    pub bias: Option<W>,
}

impl<W> Linear<W> {
    /// The same projection with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Linear<U>, E> {
        Ok(Linear {
            weight: f(&self.weight)?,
            scale: self.scale.as_ref().map(&mut *f).transpose()?,
            bias: self.bias.as_ref().map(&mut *f).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);
    impl TensorSource for Bytes {
        fn bytes(&self, _: usize) -> &[u8] {
            &self.0
        }
    }

    /// Rows 1, 2, 5 of a tensor `[8, 128]` in Q8_0, and columns 32 to 96 of them: by rows, by runs and in odd pieces.
    #[test]
    fn parts_of_weights_are_read_alike() {
        let source = Bytes((0..8 * 4 * 34).map(|i| (i % 251) as u8).collect());
        let whole = Weight::new("w".into(), 0, TensorType::Q8_0, 8, 128).with_rows([1..3, 5..7]).row_range(0..3);
        assert_eq!(whole.rows, [1..3, 5..6]);
        let part = whole.col_range(32..96);
        assert_eq!((part.n_rows(), part.row_bytes(), part.n_bytes()), (3, 68, 204));
        for weight in [&whole, &part] {
            let first = 34 * (weight.first_col / 32);
            let expected: Vec<u8> =
                [1, 2, 5].iter().flat_map(|r| &source.0[r * 136 + first..][..weight.row_bytes()]).copied().collect();
            assert_eq!(weight.runs(&source).collect::<Vec<_>>().concat(), expected);
            let rows: Vec<u8> = (0..3).flat_map(|row| weight.row(&source, row)).copied().collect();
            assert_eq!(rows, expected);
            for step in [1, 7, 100, 1000] {
                let mut read = vec![0; expected.len()];
                for (i, out) in read.chunks_mut(step).enumerate() {
                    weight.read(&source, i * step, out);
                }
                assert_eq!(read, expected, "in pieces of {step}");
            }
        }
    }
}
