//! `Ffn` on the GPU: norm; gate and up with SwiGLU, quantised for what follows; down onto the residual stream.

use crate::arena::Ptr;
use crate::error::Error;
use crate::gemv::{Gemv, GemvSwiglu};
use crate::ops::{DeviceWeight, Linker, Norm, Step};
use tandem_spec::Ffn;

/// A block with its kernels.
pub(crate) struct FfnOp {
    norm: Norm,
    gate_up: GemvSwiglu,
    /// Where gate or up is of floats and down is not.
    quantise: Option<Norm>,
    down: Gemv,
    quantised: bool,
}

impl FfnOp {
    pub fn new(linker: &mut Linker, block: Ffn<DeviceWeight>) -> Result<Self, Error> {
        let mut norm = Norm::new(linker, &block.ffn_norm, block.shape.rms_eps, &[&block.ffn_gate, &block.ffn_up])?;
        let gate_up = GemvSwiglu::new(linker, &block.ffn_gate, &block.ffn_up)?;
        let quantised = block.ffn_down.weight.ty.is_quantised();
        let mut quantise = None;
        if !gate_up.has_few() {
            norm = norm.with_codes();
            quantise = quantised.then(|| Norm::quantiser(linker, block.shape.n_ff)).transpose()?;
        }
        Ok(Self { norm, gate_up, quantise, down: Gemv::new(linker, &[&block.ffn_down])?, quantised })
    }

    pub fn launch(&self, step: &Step) -> Result<(), Error> {
        let n = step.n_tokens;
        self.norm.launch(step, step.x, Ptr::NULL, &step.hidden, n)?;
        match &self.quantise {
            Some(quantise) if n > 1 => {
                self.gate_up.launch(step, &step.hidden, &step.mixed, n, false)?;
                quantise.launch(step, step.mixed.x, Ptr::NULL, &step.mixed, n)?;
            }
            _ => self.gate_up.launch(step, &step.hidden, &step.mixed, n, self.quantised)?,
        }
        self.down.launch(step, &step.mixed, &[step.x], n, true)
    }
}
