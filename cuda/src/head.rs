//! `Head` on the GPU: the norm of the wanted rows and the output product; the choice of each row's next token
//! (`sample.cu`), which brings the rows of the next decode step forward. Refuses samplers that need more than
//! [`MAX_CANDIDATES`] candidates or more than [`MAX_WINDOW`] recent tokens: those are for the host.

use crate::arena::{Ptr, Range, Ranges};
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::gemv::Gemv;
use crate::ops::{DeviceWeight, Linker, Norm, Step};
use tandem_spec::{Head, SamplerOptions};

/// Largest top-k.
const MAX_CANDIDATES: usize = 256;

/// Most recent tokens that penalties look back to.
pub(crate) const MAX_WINDOW: usize = 1024;

/// Threads of `choose`, as in sample.cu.
const THREADS: usize = 512;

/// What stands in place of a token where the logits are unusable, as in sample.cu.
pub(crate) const NO_TOKEN: u32 = u32::MAX;

/// Whether the device chooses as `options` say.
pub fn can_sample(options: &SamplerOptions) -> bool {
    let few = options.temperature == 0.0 || (1..=MAX_CANDIDATES).contains(&options.top_k);
    few && options.window() <= MAX_WINDOW
}

/// What choosing keeps on the device, as ranges of the state arena or as addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampled<T> {
    /// Largest keys of groups of logits `[n_slots, n_groups]` u32.
    maxima: T,
    /// Largest keys `[n_slots]` u64.
    best: T,
    /// Finished blocks `[n_slots]` u32.
    done: T,
    /// `[n_slots]` [`SlotSampler`].
    pub samplers: T,
    /// `[n_slots, MAX_WINDOW]` u32.
    pub recent: T,
    /// Occurrences among the recent tokens `[n_slots, n_vocab]` u16.
    pub counts: T,
    /// Start of the step and busy time, u64 each, in nanoseconds, and a counter.
    pub clock: T,
}

impl Sampled<Range> {
    pub fn new(ranges: &mut Ranges, n_slots: usize, n_vocab: usize) -> Self {
        Self {
            maxima: ranges.take(n_slots * n_groups(n_vocab) * 4),
            best: ranges.take(n_slots * 8),
            done: ranges.take(n_slots * 4),
            samplers: ranges.take(n_slots * size_of::<SlotSampler>()),
            recent: ranges.take(n_slots * MAX_WINDOW * 4),
            counts: ranges.take(n_slots * n_vocab * 2),
            clock: ranges.take(24),
        }
    }

    /// What must be zero before the first step; a sampler of zeros takes the most likely token.
    pub fn zeroed(&self) -> [Range; 4] {
        [self.best, self.done, self.samplers, self.clock]
    }

    pub fn map(&self, base: impl Fn(Range) -> Ptr) -> Sampled<Ptr> {
        let Self { maxima, best, done, samplers, recent, counts, clock } = *self;
        Sampled {
            maxima: base(maxima),
            best: base(best),
            done: base(done),
            samplers: base(samplers),
            recent: base(recent),
            counts: base(counts),
            clock: base(clock),
        }
    }
}

/// Groups of logits: as N_GROUPS in sample.cu, at most 16 a thread.
fn n_groups(n_vocab: usize) -> usize {
    n_vocab.div_ceil(32 * n_vocab.div_ceil(16 * THREADS * 32).max(1))
}

/// How a slot chooses, as kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SlotSampler {
    seed: u64,
    top_p: u64,
    min_p: u64,
    temperature: f32,
    repeat: f32,
    inverse_repeat: f32,
    presence: f32,
    frequency: f32,
    top_k: u32,
    window: u32,
    n_seen: u32,
}

impl SlotSampler {
    /// For `options` with `n_seen` tokens in the window.
    pub fn new(options: &SamplerOptions, n_seen: usize) -> Self {
        assert!(can_sample(options), "the host samples {options:?}");
        Self {
            seed: options.seed,
            top_p: options.top_p_share(),
            min_p: options.min_p_weight(),
            temperature: options.temperature,
            repeat: options.repeat_penalty,
            inverse_repeat: 1.0 / options.repeat_penalty,
            presence: options.presence_penalty,
            frequency: options.frequency_penalty,
            top_k: options.top_k.min(MAX_CANDIDATES) as u32,
            window: options.window() as u32,
            n_seen: n_seen as u32,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ChooseArgs {
    logits: Ptr,
    maxima: Ptr,
    best: Ptr,
    done: Ptr,
    samplers: Ptr,
    recent: Ptr,
    counts: Ptr,
    rows: Ptr,
    sequences: Ptr,
    chosen: Ptr,
    clock: Ptr,
}
// SAFETY: mirrors ChooseArgs in sample.cu, which compares sizes.
unsafe impl Args for ChooseArgs {}

/// A block with its kernels.
pub(crate) struct HeadOp {
    pub n_vocab: usize,
    norm: Norm,
    output: Gemv,
    choose: Function,
}

impl HeadOp {
    pub fn new(linker: &mut Linker, block: Head<DeviceWeight>) -> Result<Self, Error> {
        let n_vocab = block.shape.n_vocab;
        let program = Program::new("sample.cu", include_str!("sample.cu"))
            .args::<ChooseArgs>("CHOOSE_ARGS")
            .define("SAMPLER_BYTES", size_of::<SlotSampler>())
            .define("MAX_CANDIDATES", MAX_CANDIDATES)
            .define("MAX_WINDOW", MAX_WINDOW)
            .define("N_VOCAB", n_vocab);
        Ok(Self {
            n_vocab,
            norm: Norm::new(linker, &block.output_norm, block.shape.rms_eps, &[&block.output])?,
            output: Gemv::new(linker, &[&block.output])?,
            choose: linker.function(program, "choose", 0)?,
        })
    }

    /// Logits of `n` wanted rows from `first` on, to the start of the logits.
    pub fn launch(&self, step: &Step, first: usize, n: usize) -> Result<(), Error> {
        let gather = step.wanted.offset(first * 4);
        self.norm.launch(step, step.x, gather, &step.hidden, n)?;
        self.output.launch(step, &step.hidden, &[step.logits], n, false)
    }

    /// The next token of every row: to `chosen`, and into rows and runs, one position on.
    pub fn choose(&self, step: &Step, chosen: Ptr) -> Result<(), Error> {
        let Sampled { maxima, best, done, samplers, recent, counts, clock } = step.sampled;
        let (logits, rows, sequences) = (step.logits, step.rows, step.runs);
        let args = ChooseArgs { logits, maxima, best, done, samplers, recent, counts, rows, sequences, chosen, clock };
        // Two groups a warp: all blocks run at once on a large GPU, with enough loads in flight.
        let blocks = n_groups(self.n_vocab).div_ceil(2 * THREADS / 32);
        let launch = Launch::grid(blocks, step.n_tokens, 1, THREADS);
        // SAFETY: logits, rows, runs and `chosen` hold `n_tokens` rows, the rest a row for each slot; what must be zero
        // before is zeroed with the state and left so.
        unsafe { self.choose.launch_early(step.device, launch, &args) }
    }
}
