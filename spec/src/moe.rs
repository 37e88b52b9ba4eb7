//! `Moe`: mixture of experts on `h = rms(x, ffn_norm)`: softmax over all experts of `ffn_gate_inp . h`, the
//! `n_used` largest (ties: lower index), their weights renormalised to sum one (the sum at least 2^-14);
//! `x += sum_e w_e down_e . (silu(gate_e . h) * (up_e . h)) + sigmoid(gate . h) * shared(h)`.

use crate::{Linear, Matrix, ffn::swiglu, math};
use std::ops::Range;

/// Shape of a mixture-of-experts block.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MoeShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Routed experts.
    pub n_experts: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Hidden width of a routed expert.
    pub n_ff: usize,
    /// Hidden width of the shared expert; 0 without one.
    pub n_ff_shared: usize,
    /// Epsilon of the norm.
    pub rms_eps: f32,
}

/// The expert that every token uses.
#[derive(Clone, Debug)]
pub struct SharedExpert<W> {
    /// `[n_embd]` f32: its sigmoid gate, one number per token; absent: factor 1.
    pub ffn_gate_inp_shexp: Option<W>,
    /// `[n_ff_shared, n_embd]`.
    pub ffn_gate_shexp: Linear<W>,
    /// `[n_ff_shared, n_embd]`.
    pub ffn_up_shexp: Linear<W>,
    /// `[n_embd, n_ff_shared]`.
    pub ffn_down_shexp: Linear<W>,
}

/// A mixture-of-experts block, or a share of one.
#[derive(Clone, Debug)]
pub struct Moe<W> {
    /// Layer number, as in `blk.{layer}`.
    pub layer: usize,
    /// Sizes.
    pub shape: MoeShape,
    /// Experts whose weights are here, all unless the block is a share; the router knows them all.
    pub experts: Range<usize>,
    /// `[n_embd]` f32.
    pub ffn_norm: W,
    /// `[n_experts, n_embd]` f32: the router.
    pub ffn_gate_inp: W,
    /// `[n_experts * n_ff, n_embd]`, expert after expert: those that are here.
    pub ffn_gate_exps: Linear<W>,
    /// `[n_experts * n_ff, n_embd]`.
    pub ffn_up_exps: Linear<W>,
    /// `[n_experts * n_embd, n_ff]`.
    pub ffn_down_exps: Linear<W>,
    /// Shared expert (qwen35moe, qwen3next).
    pub shared: Option<SharedExpert<W>>,
}

impl<W> Moe<W> {
    /// The stacks of routed experts: gate, up and down.
    pub fn stacks(&self) -> [&Linear<W>; 3] {
        [&self.ffn_gate_exps, &self.ffn_up_exps, &self.ffn_down_exps]
    }

    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Moe<U>, E> {
        let shared = match &self.shared {
            None => None,
            Some(s) => Some(SharedExpert {
                ffn_gate_inp_shexp: s.ffn_gate_inp_shexp.as_ref().map(&mut *f).transpose()?,
                ffn_gate_shexp: s.ffn_gate_shexp.try_map(f)?,
                ffn_up_shexp: s.ffn_up_shexp.try_map(f)?,
                ffn_down_shexp: s.ffn_down_shexp.try_map(f)?,
            }),
        };
        Ok(Moe {
            layer: self.layer,
            shape: self.shape.clone(),
            experts: self.experts.clone(),
            ffn_norm: f(&self.ffn_norm)?,
            ffn_gate_inp: f(&self.ffn_gate_inp)?,
            ffn_gate_exps: self.ffn_gate_exps.try_map(f)?,
            ffn_up_exps: self.ffn_up_exps.try_map(f)?,
            ffn_down_exps: self.ffn_down_exps.try_map(f)?,
            shared,
        })
    }
}

/// Least sum of the chosen weights that they are divided by: the smallest normal half.
pub const MIN_WEIGHT_SUM: f64 = 6.103515625e-5;

impl Moe<Matrix> {
    /// The experts (index, weight) of one normed row `h` `[n_embd]`, largest weight first.
    pub fn route(&self, h: &[f64]) -> Vec<(usize, f64)> {
        let mut p = self.ffn_gate_inp.product(0..self.shape.n_experts, h);
        math::softmax(&mut p);
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
        order.truncate(self.shape.n_used);
        let sum = order.iter().map(|e| p[*e]).sum::<f64>().max(MIN_WEIGHT_SUM);
        order.into_iter().map(|e| (e, p[e] / sum)).collect()
    }

    /// Reference: adds the block's output to every row of `x` `[n_tokens, n_embd]`.
    pub fn reference(&self, x: &mut [f64]) {
        let MoeShape { n_embd, n_ff, .. } = self.shape;
        for x in x.chunks_exact_mut(n_embd) {
            let h = math::rms_norm(x, &self.ffn_norm, self.shape.rms_eps);
            for (e, weight) in self.route(&h) {
                if !self.experts.contains(&e) {
                    continue;
                }
                let e = e - self.experts.start;
                let gate = self.ffn_gate_exps.apply_stacked(e, n_ff, &h);
                let y = swiglu(gate, &self.ffn_up_exps.apply_stacked(e, n_ff, &h));
                let y = self.ffn_down_exps.apply_stacked(e, n_embd, &y);
                x.iter_mut().zip(&y).for_each(|(x, y)| *x += weight * y);
            }
            if let Some(shared) = &self.shared {
                let weight = match &shared.ffn_gate_inp_shexp {
                    Some(gate) => math::sigmoid(math::dot(&gate.values, &h)),
                    None => 1.0,
                };
                let y = swiglu(shared.ffn_gate_shexp.apply(&h), &shared.ffn_up_shexp.apply(&h));
                let y = shared.ffn_down_shexp.apply(&y);
                x.iter_mut().zip(&y).for_each(|(x, y)| *x += weight * y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TensorType, testing::Maker};

    /// Router logits 0, 2, 2, 1 and two experts: the equal ones are chosen, the lower index first, with weights
    /// one half each.
    #[test]
    fn ties_go_to_the_lower_expert() {
        let shape = MoeShape { n_embd: 1, n_experts: 4, n_used: 2, n_ff: 1, n_ff_shared: 0, rms_eps: 1e-6 };
        let mut maker = Maker::new(1, &[TensorType::F32]);
        let block = maker.moe(0, &shape);
        let Ok(mut block) = block.try_map(&mut |w| Ok::<_, std::convert::Infallible>(Matrix::decode(w, &maker.source)));
        block.ffn_gate_inp.values = vec![0.0, 2.0, 2.0, 1.0];
        assert_eq!(block.route(&[1.0]), [(1, 0.5), (2, 0.5)]);
        assert_eq!(block.route(&[-1.0])[0].0, 0);
    }
}
