//! `Head` on the GPU: the norm of the wanted rows and the output product; the largest logit of each row (`sample.cu`)
//! chooses the next token and brings the rows of the next decode step forward.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::gemv::Gemv;
use crate::ops::{DeviceWeight, Linker, Norm, Step};
use tandem_spec::Head;

#[repr(C)]
#[derive(Clone, Copy)]
struct ArgmaxArgs {
    logits: Ptr,
    best: Ptr,
    done: Ptr,
    rows: Ptr,
    sequences: Ptr,
    chosen: Ptr,
    n_vocab: u32,
    pad: u32,
}
// SAFETY: mirrors ArgmaxArgs in sample.cu, which compares sizes.
unsafe impl Args for ArgmaxArgs {}

/// A block with its kernels.
pub(crate) struct HeadOp {
    pub n_vocab: usize,
    norm: Norm,
    output: Gemv,
    argmax: Function,
}

impl HeadOp {
    pub fn new(linker: &mut Linker, block: Head<DeviceWeight>) -> Result<Self, Error> {
        let program = Program::new("sample.cu", include_str!("sample.cu")).args::<ArgmaxArgs>("ARGMAX_ARGS");
        Ok(Self {
            n_vocab: block.shape.n_vocab,
            norm: Norm::new(linker, &block.output_norm, block.shape.rms_eps, &[&block.output])?,
            output: Gemv::new(linker, &[&block.output])?,
            argmax: linker.function(program, "argmax", 0)?,
        })
    }

    /// Logits of `n` wanted rows from `first` on, to the start of the logits.
    pub fn launch(&self, step: &Step, first: usize, n: usize) -> Result<(), Error> {
        let gather = step.wanted.offset(first * 4);
        self.norm.launch(step.device, step.x, gather, &step.hidden, n)?;
        self.output.launch(step.device, &step.hidden, &[step.logits], n, false)
    }

    /// The next token of every row: to `sampled[2]`, and into rows and runs, one position on.
    pub fn choose(&self, step: &Step, sampled: [Ptr; 3]) -> Result<(), Error> {
        let args = ArgmaxArgs {
            logits: step.logits,
            best: sampled[0],
            done: sampled[1],
            rows: step.rows,
            sequences: step.runs,
            chosen: sampled[2],
            n_vocab: self.n_vocab as u32,
            pad: 0,
        };
        let blocks = self.n_vocab.div_ceil(1024).clamp(1, 128);
        // SAFETY: logits, rows and runs hold `n_tokens` rows; the scratch starts as zero and is left so.
        unsafe { self.argmax.launch_early(step.device, Launch::grid(blocks, step.n_tokens, 1, 256), &args) }
    }
}
