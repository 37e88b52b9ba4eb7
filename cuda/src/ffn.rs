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
    down: Gemv,
    quantised: bool,
}

impl FfnOp {
    pub fn new(linker: &mut Linker, block: Ffn<DeviceWeight>) -> Result<Self, Error> {
        Ok(Self {
            norm: Norm::new(linker, &block.ffn_norm, block.shape.rms_eps, &[&block.ffn_gate, &block.ffn_up])?,
            gate_up: GemvSwiglu::new(linker, &block.ffn_gate, &block.ffn_up)?,
            down: Gemv::new(linker, &[&block.ffn_down])?,
            quantised: block.ffn_down.weight.ty.is_quantised(),
        })
    }

    pub fn launch(&self, step: &Step) -> Result<(), Error> {
        let (device, n) = (step.device, step.n_tokens);
        self.norm.launch(device, step.x, Ptr::NULL, &step.hidden, n)?;
        self.gate_up.launch(device, &step.hidden, &step.mixed, n, self.quantised)?;
        self.down.launch(device, &step.mixed, &[step.x], n, true)
    }
}
