//! `DeltaNet` on the GPU: norm, one product for qkv, z, beta and alpha, the recurrent kernel (`delta_net.cu`), output
//! product. Refuses heads wider than 128.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::gemv::Gemv;
use crate::ops::{DeviceWeight, Linker, Norm, Step};
use tandem_spec::{DeltaNet, HeadOrder};

#[repr(C)]
#[derive(Clone, Copy)]
struct DeltaArgs {
    sequences: Ptr,
    u: Ptr,
    z: Ptr,
    beta: Ptr,
    alpha: Ptr,
    conv: Ptr,
    dt: Ptr,
    a: Ptr,
    norm: Ptr,
    ring: Ptr,
    state: Ptr,
    out: Ptr,
    codes: Ptr,
    heads: Ptr,
    halves: Ptr,
    eps: f32,
    pad: u32,
}
// SAFETY: mirrors DeltaArgs in delta_net.cu, which compares sizes.
unsafe impl Args for DeltaArgs {}

/// A block with its kernels.
pub(crate) struct DeltaNetOp {
    block: DeltaNet<DeviceWeight>,
    norm: Norm,
    input: Gemv,
    step: Function,
    ring: Function,
    /// Heads that are not whole units are quantised apart.
    quantise: Option<Norm>,
    output: Gemv,
}

impl DeltaNetOp {
    pub fn new(linker: &mut Linker, block: DeltaNet<DeviceWeight>) -> Result<Self, Error> {
        let s = &block.shape;
        if s.head_dim > 128 {
            return Err(Error::Unsupported(format!(
                "delta-net heads of {} elements: the GPU kernels take at most 128",
                s.head_dim
            )));
        }
        let inputs = [&block.attn_qkv, &block.attn_gate, &block.ssm_beta, &block.ssm_alpha];
        let program = Program::new("delta_net.cu", include_str!("delta_net.cu"))
            .args::<DeltaArgs>("DELTA_ARGS")
            .define("S", s.head_dim)
            .define("N_K_HEADS", s.n_k_heads)
            .define("N_V_HEADS", s.n_v_heads)
            .define("TAPS", s.conv_kernel)
            .define("TILED", u32::from(s.head_order == HeadOrder::Tiled));
        let quantised = block.ssm_out.weight.ty.is_quantised();
        let apart = quantised && !s.head_dim.is_multiple_of(32);
        Ok(Self {
            norm: Norm::new(linker, &block.attn_norm, s.rms_eps, &inputs)?,
            input: Gemv::new(linker, &inputs)?,
            step: linker.function(program.clone(), "delta_step", 0)?,
            ring: linker.function(program, "delta_ring", 0)?,
            quantise: if apart { Some(Norm::quantiser(linker, s.n_value())?) } else { None },
            output: Gemv::new(linker, &[&block.ssm_out])?,
            block,
        })
    }

    pub fn launch(&self, step: &Step) -> Result<(), Error> {
        let (b, s, device, n) = (&self.block, &self.block.shape, step.device, step.n_tokens);
        self.norm.launch(step, step.x, Ptr::NULL, &step.hidden, n)?;
        let u = step.projected;
        let z = u.offset(n * s.n_channels() * 4);
        let beta = z.offset(n * s.n_value() * 4);
        let alpha = beta.offset(n * s.n_v_heads * 4);
        self.input.launch(step, &step.hidden, &[u, z, beta, alpha], n, false)?;
        let quantised = b.ssm_out.weight.ty.is_quantised() && self.quantise.is_none();
        let only = |wanted: bool, p: Ptr| if wanted { p } else { Ptr::NULL };
        let args = DeltaArgs {
            sequences: step.runs,
            u,
            z,
            beta,
            alpha,
            conv: b.ssm_conv1d.ptr,
            dt: b.ssm_dt.ptr,
            a: b.ssm_a.ptr,
            norm: b.ssm_norm.ptr,
            ring: step.state[0],
            state: step.state[1],
            out: only(!quantised, step.mixed.x),
            codes: only(quantised && n == 1, step.mixed.codes),
            heads: step.mixed.heads,
            halves: only(quantised && n > 1, step.mixed.halves),
            eps: s.rms_eps,
            pad: 0,
        };
        // SAFETY: buffers hold `n` rows; states hold every slot, and slots were checked when the batch was built.
        unsafe {
            self.step.launch_early(device, Launch::grid(s.n_v_heads, step.n_runs, 1, 512), &args)?;
            if step.has_long_runs {
                let launch = Launch::grid(s.n_channels().div_ceil(256), step.n_runs, 1, 256);
                self.ring.launch_early(device, launch, &args)?;
            }
        }
        if let Some(quantise) = &self.quantise {
            quantise.launch(step, step.mixed.x, Ptr::NULL, &step.mixed, n)?;
        }
        self.output.launch(step, &step.mixed, &[step.x], n, true)
    }
}
