//! What the blocks share: weights on the device, the buffers between their kernels, the rows of a step, and the
//! linker that turns programs into functions. One step of a block is a few launches on the device's stream.

use crate::arena::{ALIGN, Ptr, Range, Ranges};
use crate::compile::{Args, Function, Kernels, Launch, Program};
use crate::device::Device;
use crate::error::Error;
use crate::head::Sampled;
use tandem_spec::{Block, KvDtype, Linear, StateBytes, TensorType, Weight};

/// A weight in device memory, in the layout of [`crate::layout`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceWeight {
    /// Start of its planes.
    pub ptr: Ptr,
    /// Type.
    pub ty: TensorType,
    /// Rows.
    pub n_rows: usize,
    /// Elements of a row.
    pub n_cols: usize,
}

impl DeviceWeight {
    /// `weight` without an address: for what depends on shapes only.
    pub fn unplaced(weight: &Weight) -> Self {
        Self { ptr: Ptr::NULL, ty: weight.ty, n_rows: weight.n_rows(), n_cols: weight.n_cols }
    }

    /// Quantisation blocks.
    pub fn n_blocks(&self) -> usize {
        self.n_rows * self.n_cols / self.ty.row().block_len
    }
}

/// What a block reads beside its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    /// Attention: rotary frequencies `[n_rot / 2]` f64.
    pub freq: Ptr,
    /// Their factor.
    pub magnitude: f64,
    /// Mixture: addresses of the routed experts' slots `[n_experts]` u64, 0: not here.
    pub experts: Ptr,
}

impl Constants {
    pub const NONE: Self = Self { freq: Ptr::NULL, magnitude: 1.0, experts: Ptr::NULL };
}

/// What a backend is made for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sequences that can be under way.
    pub n_slots: usize,
    /// Positions of a slot.
    pub n_ctx: usize,
    /// Tokens of the largest batch.
    pub n_batch: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

/// One token of a batch, as kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// Slot of its sequence.
    pub slot: u32,
    /// Position in its sequence.
    pub position: u32,
    /// Index of its run.
    pub sequence: u32,
    /// Token id.
    pub token: u32,
}

/// One run of a batch, as kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Run {
    /// Slot.
    pub slot: u32,
    /// Position of its first token.
    pub position: u32,
    /// Row of its first token.
    pub first_row: u32,
    /// Tokens.
    pub n_tokens: u32,
}

/// Activations `[n_tokens, n]` as floats, as int8 codes with heads of 8 bytes per 32 (one token, and experts), and as
/// 16-bit numbers (several tokens): bf16, or f16 on chips without it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input {
    pub x: Ptr,
    pub codes: Ptr,
    pub heads: Ptr,
    pub halves: Ptr,
}

/// Ranges of an [`Input`] of `n` elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InputRanges {
    x: Range,
    codes: Range,
    heads: Range,
    halves: Range,
}

impl InputRanges {
    fn new(ranges: &mut Ranges, n: usize) -> Self {
        let heads = n.div_ceil(32) * 8;
        Self { x: ranges.take(4 * n), codes: ranges.take(n), heads: ranges.take(heads), halves: ranges.take(2 * n) }
    }

    fn at(&self, base: impl Fn(Range) -> Ptr) -> Input {
        Input { x: base(self.x), codes: base(self.codes), heads: base(self.heads), halves: base(self.halves) }
    }
}

/// Tokens whose parts of attention are held at a time.
pub(crate) const PART_ROWS: usize = 16;

/// Rows of logits that are computed at a time.
pub const LOGIT_ROWS: usize = 16;

/// Where everything that changes during a step lies in the state arena: a pure function of blocks and options.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// Two ranges per block: keys and values, or ring and recurrent state.
    pub(crate) blocks: Vec<[Range; 2]>,
    pub(crate) rows: Range,
    pub(crate) runs: Range,
    pub(crate) wanted: Range,
    pub(crate) x: Range,
    pub(crate) hidden: InputRanges,
    pub(crate) projected: Range,
    pub(crate) mixed: InputRanges,
    pub(crate) parts: Range,
    /// For [`crate::few::Few`]: sums of blocks that share tiles, and counters.
    pub(crate) sums: [Range; 2],
    pub(crate) scratch: Range,
    pub(crate) tables: Range,
    pub(crate) routed: [Range; 5],
    pub(crate) done: Range,
    pub(crate) logits: Range,
    pub(crate) sampled: Sampled<Range>,
    /// Of keys and values, and of delta-net states.
    own: StateBytes,
    /// Counters of hand-overs to the CPU workers.
    pub(crate) handoff: Range,
    total: usize,
}

impl StateLayout {
    /// The layout for `blocks` and `options` on a GPU of `n_sms` multiprocessors.
    pub fn new(blocks: &[Block<Weight>], options: &Options, n_sms: usize) -> Self {
        Self::streaming(blocks, &[], options, n_sms)
    }

    /// As [`StateLayout::new`], where large batches also run the shares `streamed` of some blocks.
    pub fn streaming(blocks: &[Block<Weight>], streamed: &[Block<Weight>], options: &Options, n_sms: usize) -> Self {
        let Options { n_slots, n_ctx, n_batch, kv } = *options;
        let mut ranges = Ranges::default();
        let (mut n_embd, mut projected, mut mixed, mut parts, mut n_vocab) = (0, 0, 0, 0, 0);
        let (mut n_experts, mut n_used, mut done) = (0, 0, 0);
        let mut states = Vec::new();
        let mut own = StateBytes::default();
        for block in blocks {
            let before = ranges.total();
            let mut state = [Range::default(); 2];
            match block {
                Block::Embed(b) => n_embd = n_embd.max(b.n_embd),
                Block::Attention(b) => {
                    let s = &b.shape;
                    let bytes = n_slots * n_ctx * s.kv_bytes_per_token(kv) / 2;
                    state = [ranges.take(bytes), ranges.take(bytes)];
                    n_embd = n_embd.max(s.n_embd);
                    let q = s.n_heads * s.head_dim;
                    projected = projected.max(if s.gated { 2 * q } else { q } + 2 * s.n_kv_heads * s.head_dim);
                    mixed = mixed.max(q);
                    let splits = crate::attention::n_splits(s, options, n_sms);
                    parts = parts.max(n_batch.min(PART_ROWS) * s.n_heads * splits * (s.head_dim + 2));
                }
                Block::DeltaNet(b) => {
                    let s = &b.shape;
                    let ring = ranges.take(n_slots * crate::layout::ring_len(s) * 4);
                    state = [ring, ranges.take(n_slots * s.recurrent_len() * 4)];
                    n_embd = n_embd.max(s.n_embd);
                    projected = projected.max(s.n_channels() + s.n_value() + 2 * s.n_v_heads);
                    mixed = mixed.max(s.n_value());
                }
                Block::Ffn(b) => {
                    n_embd = n_embd.max(b.shape.n_embd);
                    mixed = mixed.max(b.shape.n_ff);
                }
                Block::Moe(b) => {
                    let s = &b.shape;
                    n_embd = n_embd.max(s.n_embd);
                    n_experts = n_experts.max(s.n_experts);
                    n_used = n_used.max(s.n_used);
                    let act = (s.n_used + 1) * s.n_ff.max(s.n_ff_shared).next_multiple_of(32);
                    mixed = mixed.max(act);
                    done = done.max(n_batch * act / 32);
                }
                Block::Head(b) => {
                    n_embd = n_embd.max(b.shape.n_embd);
                    n_vocab = n_vocab.max(b.shape.n_vocab);
                }
            }
            let bytes = (ranges.total() - before) as u64;
            match block {
                Block::Attention(_) => own.kv += bytes,
                Block::DeltaNet(_) => own.states += bytes,
                _ => assert_eq!(bytes, 0, "a state of a block that has none"),
            }
            states.push(state);
        }
        let logit_rows = LOGIT_ROWS.max(n_slots);
        let routes = if n_experts > 0 { n_batch } else { 0 };
        let rows = ranges.take(n_batch * size_of::<Row>());
        let runs = ranges.take(n_batch.min(n_slots) * size_of::<Run>());
        let wanted = ranges.take(n_batch * 4);
        let x = ranges.take(n_batch * n_embd * 4);
        // The prompt kernels' buffers and those of the token kernels take the same place.
        let offset = ranges.total();
        let hidden = InputRanges::new(&mut ranges, n_batch * n_embd);
        let projected = ranges.take(n_batch * projected * 4);
        let mixed = InputRanges::new(&mut ranges, n_batch * mixed);
        let parts = ranges.take(parts * 4);
        let [sums, counters] = crate::few::sum_bytes(blocks, n_batch, n_sms);
        let sums = ranges.take(sums);
        let needed = [blocks, streamed].map(|b| crate::prompt::scratch_bytes(b, n_batch, n_batch.min(n_slots)));
        let needed = needed[0].max(needed[1]);
        let scratch = Range { offset, bytes: needed };
        ranges.take(needed.saturating_sub(ranges.total() - offset));
        Self {
            blocks: states,
            rows,
            runs,
            wanted,
            x,
            hidden,
            projected,
            mixed,
            parts,
            sums: [sums, ranges.take(counters)],
            scratch,
            tables: ranges.take(crate::prompt::table_bytes(blocks, n_batch, n_batch.min(n_slots))),
            routed: [
                ranges.take(routes * (n_experts + 1) * 4),
                ranges.take(routes * 4),
                ranges.take(routes * n_used * 4),
                ranges.take(routes * (n_used + 1) * 4),
                ranges.take(routes * n_used * 8),
            ],
            done: ranges.take(done * 4),
            logits: ranges.take(logit_rows * n_vocab * 4),
            sampled: Sampled::new(&mut ranges, n_slots, n_vocab),
            own,
            handoff: ranges.take(crate::handoff::COUNTER_BYTES),
            total: ranges.total(),
        }
    }

    /// Bytes of the state arena.
    pub fn bytes(&self) -> usize {
        self.total
    }

    /// The same by use.
    pub fn by_use(&self) -> StateBytes {
        let logits = self.logits.bytes.next_multiple_of(ALIGN) as u64;
        let StateBytes { kv, states, .. } = self.own;
        StateBytes { kv, states, logits, scratch: self.total as u64 - kv - states - logits }
    }
}

/// Addresses of one step.
pub(crate) struct Step<'a> {
    pub device: &'a Device,
    pub rows: Ptr,
    pub runs: Ptr,
    pub wanted: Ptr,
    pub n_tokens: usize,
    pub n_runs: usize,
    /// Whether some run has more than one token.
    pub has_long_runs: bool,
    pub n_wanted: usize,
    pub n_ctx: usize,
    pub x: Ptr,
    pub hidden: Input,
    pub projected: Ptr,
    pub mixed: Input,
    pub parts: Ptr,
    /// For [`crate::few::Few`]; the counters are zero between kernels.
    pub sums: [Ptr; 2],
    /// Logits, counters, ids, weights and slots of the chosen experts.
    pub routed: [Ptr; 5],
    /// Counters of finished units, zero between kernels.
    pub done: Ptr,
    pub logits: Ptr,
    pub sampled: Sampled<Ptr>,
    /// Keys and values, or ring and recurrent state, of the block at hand.
    pub state: [Ptr; 2],
    /// Its number in the backend.
    pub block: usize,
    /// Where in host memory the first kernel of a block writes its number, so that a fault has a place.
    pub begun: Ptr,
}

impl<'a> Step<'a> {
    /// Addresses in the arena that `base` resolves ranges of; no tokens yet.
    pub fn new(
        device: &'a Device,
        layout: &StateLayout,
        options: &Options,
        begun: Ptr,
        base: impl Fn(Range) -> Ptr,
    ) -> Self {
        Self {
            device,
            rows: base(layout.rows),
            runs: base(layout.runs),
            wanted: base(layout.wanted),
            n_tokens: 0,
            n_runs: 0,
            has_long_runs: false,
            n_wanted: 0,
            n_ctx: options.n_ctx,
            x: base(layout.x),
            hidden: layout.hidden.at(&base),
            projected: base(layout.projected),
            mixed: layout.mixed.at(&base),
            parts: base(layout.parts),
            sums: layout.sums.map(&base),
            routed: layout.routed.map(&base),
            done: base(layout.done),
            logits: base(layout.logits),
            sampled: layout.sampled.map(&base),
            state: [Ptr::NULL; 2],
            block: 0,
            begun,
        }
    }
}

/// Activations that share a scale where they are rounded to 8 bits before weights of `ty`: the columns of a block, but
/// 32 for IQ4_XS, as on the CPU.
pub(crate) fn rounding_group(ty: TensorType) -> usize {
    if ty == TensorType::IQ4_XS { 32 } else { ty.row().block_len }
}

/// Turns programs into functions; without kernels it only collects the programs.
pub(crate) struct Linker<'a> {
    kernels: Option<&'a Kernels>,
    pub programs: Vec<Program>,
    pub n_sms: usize,
}

impl<'a> Linker<'a> {
    /// Collects programs.
    pub fn collecting(n_sms: usize) -> Self {
        Self { kernels: None, programs: Vec::new(), n_sms }
    }

    /// Resolves functions of prepared programs.
    pub fn resolving(kernels: &'a Kernels, n_sms: usize) -> Self {
        Self { kernels: Some(kernels), programs: Vec::new(), n_sms }
    }

    /// Kernel `entry` of `program`, with up to `shared` bytes of dynamic shared memory.
    pub fn function(&mut self, program: Program, entry: &str, shared: usize) -> Result<Function, Error> {
        match self.kernels {
            Some(kernels) => kernels.function(&program, entry, shared),
            None => {
                self.programs.push(program);
                Ok(Function::unresolved())
            }
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    x: Ptr,
    weight: Ptr,
    gather: Ptr,
    out: Ptr,
    codes: Ptr,
    heads: Ptr,
    halves: Ptr,
    begun: Ptr,
    eps: f32,
    block: u32,
}
// SAFETY: mirrors NormArgs in norm.cu, which compares sizes.
unsafe impl Args for NormArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedArgs {
    weight: Ptr,
    rows: Ptr,
    x: Ptr,
    n_blocks: u64,
    started: Ptr,
    begun: Ptr,
    block: u32,
    pad: u32,
}
// SAFETY: mirrors EmbedArgs in norm.cu, which compares sizes.
unsafe impl Args for EmbedArgs {}

fn norm_program(n: usize) -> Program {
    Program::new("norm.cu", include_str!("norm.cu"))
        .args::<NormArgs>("NORM_ARGS")
        .args::<EmbedArgs>("EMBED_ARGS")
        .define("N", n)
}

/// Threads of `norm_rows`: as THREADS in norm.cu.
fn norm_threads(n: usize) -> usize {
    let elements = if n.is_multiple_of(32) { n / 4 } else { n };
    elements.next_multiple_of(32).min(1024)
}

/// RMS norm of rows, or only the form that quantised matrices take.
pub(crate) struct Norm {
    n: usize,
    weight: Ptr,
    eps: f32,
    /// Which forms the matrices that follow take.
    floats: bool,
    quantised: bool,
    always_codes: bool,
    function: Function,
}

impl Norm {
    /// `weight` `[n]` f32, before the matrices `users`.
    pub fn new(
        linker: &mut Linker,
        weight: &DeviceWeight,
        eps: f32,
        users: &[&Linear<DeviceWeight>],
    ) -> Result<Self, Error> {
        let mut quantised = users.iter().map(|l| l.weight.ty.is_quantised());
        Ok(Self {
            n: weight.n_cols,
            weight: weight.ptr,
            eps,
            floats: !quantised.clone().all(|q| q),
            quantised: quantised.any(|q| q),
            always_codes: false,
            function: linker.function(norm_program(weight.n_cols), "norm_rows", 0)?,
        })
    }

    /// Quantises rows of `n`.
    pub fn quantiser(linker: &mut Linker, n: usize) -> Result<Self, Error> {
        let function = linker.function(norm_program(n), "norm_rows", 0)?;
        Ok(Self { n, weight: Ptr::NULL, eps: 0.0, floats: false, quantised: true, always_codes: false, function })
    }

    /// As codes for any number of tokens: for kernels that take no 16-bit numbers.
    pub fn with_codes(mut self) -> Self {
        self.always_codes = true;
        self
    }

    /// `out` = rows of `x` (row `gather[i]`, or `i`), `n_rows` of them. A block begins with its norm.
    pub fn launch(&self, step: &Step, x: Ptr, gather: Ptr, out: &Input, n_rows: usize) -> Result<(), Error> {
        let only = |wanted: bool, p: Ptr| if wanted { p } else { Ptr::NULL };
        let args = NormArgs {
            x,
            weight: self.weight,
            gather,
            out: only(self.floats, out.x),
            codes: only(self.quantised && (n_rows == 1 || self.always_codes), out.codes),
            heads: out.heads,
            halves: only(self.quantised && n_rows > 1, out.halves),
            begun: only(self.weight != Ptr::NULL, step.begun),
            eps: self.eps,
            block: step.block as u32,
        };
        let threads = norm_threads(self.n);
        // SAFETY: `x` and `out` hold `n_rows` rows of `n`; codes are asked for only where `n` is whole units.
        unsafe { self.function.launch_early(step.device, Launch::new(n_rows, threads), &args) }
    }
}

/// Token rows of the embedding.
pub(crate) struct Embed {
    weight: DeviceWeight,
    function: Function,
}

impl Embed {
    pub fn new(linker: &mut Linker, block: &tandem_spec::Embed<DeviceWeight>) -> Result<Self, Error> {
        let program = norm_program(block.n_embd).define("TYPE", block.token_embd.ty as u32);
        Ok(Self { weight: block.token_embd, function: linker.function(program, "embed", 0)? })
    }

    /// Fills the residual stream.
    pub fn launch(&self, step: &Step) -> Result<(), Error> {
        let args = EmbedArgs {
            weight: self.weight.ptr,
            rows: step.rows,
            x: step.x,
            n_blocks: self.weight.n_blocks() as u64,
            started: step.sampled.clock,
            begun: step.begun,
            block: step.block as u32,
            pad: 0,
        };
        let launch = Launch::grid(self.weight.n_cols.div_ceil(256), step.n_tokens, 1, 256);
        // SAFETY: token ids were checked when the batch was built; the stream holds `n_tokens` rows.
        unsafe { self.function.launch(step.device, launch, &args) }
    }
}
