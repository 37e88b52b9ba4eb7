//! The arithmetic of the reference: decoded weights, and the elementary functions of the blocks, in f64.
//! Written to be read; backends share nothing with it.

use crate::{Linear, TensorSource, Weight};

/// A decoded weight `[n_rows, n_cols]`; a vector is one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Elements of a row.
    pub n_cols: usize,
    /// Values, row after row.
    pub values: Vec<f32>,
}

impl Matrix {
    /// Decodes every row of `weight`.
    pub fn decode(weight: &Weight, source: &dyn TensorSource) -> Self {
        Self { n_cols: weight.n_cols, values: weight.decode(source) }
    }

    /// Row `i` `[n_cols]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.n_cols..(i + 1) * self.n_cols]
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.values.len() / self.n_cols
    }

    /// `rows . x`, one value for each of `rows`.
    pub fn product(&self, rows: std::ops::Range<usize>, x: &[f64]) -> Vec<f64> {
        rows.map(|i| dot(self.row(i), x)).collect()
    }
}

impl Linear<Matrix> {
    /// `scale * (weight . x) + bias` `[n_out]`.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        self.apply_stacked(0, self.weight.n_rows(), x)
    }

    /// The same for matrix number `i` of a stack of matrices with `n_out` rows each.
    pub fn apply_stacked(&self, i: usize, n_out: usize, x: &[f64]) -> Vec<f64> {
        let mut y = self.weight.product(i * n_out..(i + 1) * n_out, x);
        if let Some(scale) = &self.scale {
            y.iter_mut().for_each(|y| *y *= f64::from(scale.values[i]));
        }
        if let Some(bias) = &self.bias {
            y.iter_mut().zip(&bias.values).for_each(|(y, b)| *y += f64::from(*b));
        }
        y
    }
}

/// `w . x`.
pub fn dot(w: &[f32], x: &[f64]) -> f64 {
    assert_eq!(w.len(), x.len());
    // Eight partial sums, so that the compiler may use vectors: whole models run through this.
    let mut sums = [0.0; 8];
    let (w8, w_tail) = w.as_chunks::<8>();
    let (x8, x_tail) = x.as_chunks::<8>();
    for (w, x) in w8.iter().zip(x8) {
        for i in 0..8 {
            sums[i] += f64::from(w[i]) * x[i];
        }
    }
    let tail: f64 = w_tail.iter().zip(x_tail).map(|(w, x)| f64::from(*w) * x).sum();
    sums.iter().sum::<f64>() + tail
}

/// `x / sqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(x: &[f64], weight: &Matrix, eps: f32) -> Vec<f64> {
    assert_eq!(x.len(), weight.values.len());
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(&weight.values).map(|(x, w)| x * factor * f64::from(*w)).collect()
}

/// `x / sqrt(sum(x^2) + eps)`, in place.
pub fn l2_norm(x: &mut [f64], eps: f32) {
    let sum = x.iter().map(|x| x * x).sum::<f64>();
    let factor = 1.0 / (sum + f64::from(eps)).sqrt();
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x * sigmoid(x)`.
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// `ln(1 + exp(x))`, without overflow.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `exp(x - max) / sum exp(x - max)`, in place.
pub fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// `y += x`.
pub fn add(y: &mut [f64], x: &[f64]) {
    assert_eq!(y.len(), x.len());
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}
