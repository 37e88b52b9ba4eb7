//! Tensors as a file states them, and weights as a block uses them.
//!
//! A weight is a gather of whole rows of one file tensor. Files store some projections fused or
//! interleaved (`attn_qkv` of dense models, `ffn_gate_up_exps`, the old `ssm_in`, `ssm_ba`); the
//! model description undoes that with row ranges, so that backends see one canonical layout.

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

/// Whole rows of one file tensor, in the order in which a block wants them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
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
    /// Rows of the file tensor, concatenated in this order; adjacent ranges are merged.
    pub rows: Vec<Range<usize>>,
}

impl Weight {
    /// All rows of `tensor`, which has index `index`.
    pub fn whole(index: usize, tensor: &Tensor) -> Self {
        Self {
            name: tensor.name.clone(),
            tensor: index,
            ty: tensor.ty,
            n_cols: tensor.n_cols(),
            rows: std::iter::once(0..tensor.n_rows()).collect(),
        }
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

    /// The runs of bytes that hold the rows, in order; one run if the rows are contiguous.
    pub fn runs<'a>(&'a self, source: &'a dyn TensorSource) -> impl Iterator<Item = &'a [u8]> {
        let bytes = source.bytes(self.tensor);
        let row_bytes = self.row_bytes();
        self.rows.iter().map(move |r| &bytes[r.start * row_bytes..r.end * row_bytes])
    }

    /// The bytes of row `row` of this weight.
    ///
    /// # Panics
    /// If the weight has no such row.
    pub fn row<'a>(&self, source: &'a dyn TensorSource, row: usize) -> &'a [u8] {
        let mut left = row;
        for range in &self.rows {
            if left < range.len() {
                let at = (range.start + left) * self.row_bytes();
                return &source.bytes(self.tensor)[at..at + self.row_bytes()];
            }
            left -= range.len();
        }
        panic!("row {row} of {}, which has {}", self.name, self.n_rows());
    }

    /// Decodes `rows` of this weight into `out` `[rows.len(), n_cols]`.
    ///
    /// # Panics
    /// If the weight lacks some of the rows, or `out` has another length.
    pub fn decode_rows(&self, source: &dyn TensorSource, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.n_cols, "elements of {} rows of {}", rows.len(), self.name);
        for (row, out) in rows.zip(out.chunks_exact_mut(self.n_cols)) {
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
