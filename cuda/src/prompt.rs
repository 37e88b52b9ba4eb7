//! Blocks over many tokens: products on the tensor cores, the chunked delta rule, flash attention, experts sorted
//! on the device. Owns the launchers of the `_prompt` kernels and the sizes of their scratch memory; knows no batch
//! policy and copies nothing but its own tables. Nothing here waits for the device.
//!
//! Accuracy: quantised and BF16 weights are multiplied as bf16 with activations rounded to bf16 (relative rms about
//! 2e-3 per product), F16 weights with activations rounded to f16 (3e-4), F32 weights in f32. Sums are f32. On chips
//! without bf16 (7.5) all but F32 weights are multiplied as f16. Where the chip's 8-bit rate is the higher one
//! ([`Products`]), quantised weights meet 8-bit activations, rounded in the groups of [`rounding_group`]: of 256 before
//! K-quants as on the CPU, coarser than this GPU's single tokens (relative rms about 7e-3 per product).

use crate::arena::{ALIGN, Ptr, Range, Ranges};
use crate::compile::{Args, Function, Launch, Program};
use crate::dense::{self, Dense};
use crate::device::Device;
use crate::error::{During, Error};
use crate::handoff::Chosen;
use crate::moe::routed;
use crate::ops::{Constants, DeviceWeight, Linker, rounding_group};
use crate::stream::Parts;
use cudarc::driver::result;
use std::collections::HashMap;
use std::sync::OnceLock;
use tandem_spec::{
    Attention, AttentionShape, Batch, Block, DeltaNet, DeltaNetShape, Ffn, Head, HeadOrder, KvDtype, Linear, Moe,
    RopeStyle, TensorType, Weight,
};

/// Rows of a tile of the three products: a few, some, many.
const TILES: [usize; 3] = [8, 32, 128];
/// Of `gemm_int8`: some and many. Types with a scale for 16 columns need more registers.
fn tiles_int8(ty: TensorType) -> [usize; 2] {
    let has_half_scales = matches!(ty, TensorType::Q2_K | TensorType::Q3_K | TensorType::Q6_K);
    [32, if has_half_scales { 64 } else { 128 }]
}

/// Bytes of a RowTile in prompt.cu.
const TILE_BYTES: usize = 24;
/// Rows of a tile of `gemm_f32`.
const TILE_F32: usize = 8;
/// Rows of a tile of `gemm_f32_tile`, and rows from which on it is used.
const TILE_F32_MANY: usize = 64;
/// Rows of a block of the two attention kernels.
const FLASH_ROWS: usize = 64;
const PLAIN_ROWS: usize = 16;
/// Rows from which on, on chips whose best instructions `gemm.cu` cannot use, cuBLASLt does the products of matrices
/// of at least [`DENSE_WEIGHTS`] elements, decoded panel by panel to 16 bits. On an H200, 128 rows by 12288 x 4096 take
/// 39 us there, 32 us to decode, and 97 us in `gemm_tile`.
const DENSE_FROM: usize = 128;
const DENSE_WEIGHTS: usize = 1 << 20;
/// How the products of prompts are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// In 16 bits, large ones by cuBLASLt where it is installed.
    Library,
    /// In 16 bits, by `gemm.cu`.
    Halves,
    /// Activations of 8 bits before quantised weights, as for single tokens, by `gemm.cu`; others in 16 bits.
    Int8,
}

impl Products {
    /// The fastest on chips of compute capability `arch`: the library where there are instructions that `gemm.cu`
    /// cannot use. `gemm_int8` makes about 330 multiply-adds a cycle and multiprocessor on an H200, bound by what its
    /// f32 lanes do with the scales; GeForce cards of 8.6, 8.9 and 12.0, which have as many, make 256 at most in 16
    /// bits with f32 sums. Those of 7.5 have half the lanes, and 8.0 makes 1024 in 16 bits.
    pub fn fastest(arch: (i32, i32)) -> Self {
        match arch {
            (9 | 10, _) => Self::Library,
            (8, 6..) | (12, _) => Self::Int8,
            _ => Self::Halves,
        }
    }
}

/// Bytes of a panel.
const PANEL_BYTES: usize = 64 << 20;
/// Outputs up to which the kernel for few rows is used for many: it splits the inputs, where tiles would be too few.
const FEW_OUTPUTS: usize = 64;
/// Threads of a block of `delta_chunk` and `delta_scan`.
const DELTA_THREADS: usize = 256;

macro_rules! args {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct $name { $($field: $ty),* }
        // SAFETY: plain integers and addresses; mirrors the struct of the same name in the source, which compares
        // sizes.
        unsafe impl Args for $name {}
    };
}

args!(GemmArgs {
    w: Ptr,
    w2: Ptr,
    n_blocks: u64,
    x: Ptr,
    heads: Ptr,
    gather: Ptr,
    tiles: Ptr,
    n_tiles: Ptr,
    y: Ptr,
    scale: Ptr,
    scale2: Ptr,
    bias: Ptr,
    n_rows: i32,
    n_out: i32,
    n_in: i32,
    ld_y: i32,
    add: i32,
    y_kind: i32,
});
args!(RowsArgs { x: Ptr, w: Ptr, gather: Ptr, y: Written, n: i32, eps: f32 });
args!(SwigluArgs { gate: Ptr, up: Ptr, y: Written, n: u64 });
args!(SwigluHalvesArgs { gate: Ptr, up: Ptr, y: Ptr, n: u64, is_f16: u32, pad: u32 });
args!(RoundArgs { x: Ptr, codes: Ptr, heads: Ptr, n: u64, group: u32, pad: u32 });
args!(DecodeRowsArgs { w: Ptr, out: Ptr, n_blocks: u64, first: u64, n_units: u64 });
args!(GatedNormArgs { o: Ptr, z: Ptr, w: Ptr, y: Written, n_rows: i32, s: i32, eps: f32, pad: u32 });
args!(ExpertArgs {
    logits: Ptr,
    table: Ptr,
    expert: Ptr,
    weight: Ptr,
    slot: Ptr,
    token: Ptr,
    row: Ptr,
    count: Ptr,
    tiles: Ptr,
    n_tiles: Ptr,
    n_tokens: i32,
    n_experts: i32,
    n_used: i32,
    height: i32,
    first_expert: i32,
    pad: i32,
});
args!(CombineArgs {
    x: Ptr,
    y: Ptr,
    row: Ptr,
    weight: Ptr,
    slot: Ptr,
    shared: Ptr,
    h: Ptr,
    shared_gate: Ptr,
    n: i32,
    n_used: i32,
});
args!(DeltaPromptArgs {
    chunks: Ptr,
    sequences: Ptr,
    first_chunk: Ptr,
    u: Ptr,
    alpha: Ptr,
    beta: Ptr,
    conv_w: Ptr,
    ssm_a: Ptr,
    ssm_dt: Ptr,
    ring: Ptr,
    state: Ptr,
    qk: Ptr,
    v: Ptr,
    uw: Ptr,
    p: Ptr,
    g: Ptr,
    o: Ptr,
    eps: f32,
    pad: u32,
});
args!(AttentionPromptArgs {
    sequences: Ptr,
    blocks: Ptr,
    rows: Ptr,
    q: Ptr,
    k: Ptr,
    v: Ptr,
    q_norm: Ptr,
    k_norm: Ptr,
    freq: Ptr,
    k_cache: Ptr,
    v_cache: Ptr,
    q_rotated: Ptr,
    out: Ptr,
    n_ctx: u64,
    rope_magnitude: f32,
    eps: f32,
    flash: i32,
    out_kind: i32,
});

/// What the products of many tokens compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Math {
    /// The chip has bf16.
    bf16: bool,
    /// Quantised weights meet 8-bit activations.
    int8: bool,
}

impl Math {
    /// Copies of a tile's activations that are under way: as STAGES in gemm.cu.
    fn stages(self) -> usize {
        if self.bf16 { 3 } else { 2 }
    }
}

/// Activations in the formats that kernels write.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    f32: Ptr,
    f16: Ptr,
    bf16: Ptr,
}

/// Codes of activations and their heads (`Q8Head` in common.cuh, one for 32).
#[derive(Clone, Copy, Debug, Default)]
struct Codes {
    codes: Ptr,
    heads: Ptr,
}

/// Activations in each format that they are multiplied in. Codes are made of the floats, by [`Prompt::round`].
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    written: Written,
    /// Rounded in groups of 32 and of 256.
    codes: [Codes; 2],
}

/// A format of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    F32,
    F16,
    Bf16,
    /// 8-bit codes with a scale for so many.
    Int8(usize),
}

impl Form {
    fn is_int8(self) -> bool {
        matches!(self, Self::Int8(_))
    }

    fn is_half(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }

    /// The format in which kernels write what is to be in this one.
    fn written(self) -> Self {
        if self.is_int8() { Self::F32 } else { self }
    }

    /// As kernels name formats that they write.
    fn kind(self) -> i32 {
        match self {
            Self::F32 | Self::Int8(_) => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }
}

impl Forms {
    fn codes(&self, group: usize) -> Codes {
        self.codes[usize::from(group == 256)]
    }

    /// What a product reads: not the heads of codes.
    fn get(&self, form: Form) -> Ptr {
        match form {
            Form::F32 => self.written.f32,
            Form::F16 => self.written.f16,
            Form::Bf16 => self.written.bf16,
            Form::Int8(group) => self.codes(group).codes,
        }
    }
}

/// The format in which activations meet weights of `ty` with rows of `n_cols`.
fn form(ty: TensorType, n_cols: usize, math: Math) -> Form {
    if ty == TensorType::F32 || !n_cols.is_multiple_of(32) {
        Form::F32
    } else if math.int8 && ty.is_quantised() {
        Form::Int8(rounding_group(ty))
    } else if ty == TensorType::F16 || !math.bf16 {
        Form::F16
    } else {
        Form::Bf16
    }
}

/// Hands out parts of the scratch memory; with a base of zero it only counts.
#[derive(Clone)]
struct Scratch {
    base: Ptr,
    ranges: Ranges,
}

impl Scratch {
    fn new(base: Ptr) -> Self {
        Self { base, ranges: Ranges::default() }
    }

    fn bytes(&mut self, n: usize) -> Ptr {
        let Range { offset, .. } = self.ranges.take(n);
        self.base.offset(offset)
    }

    /// A panel and a workspace for products of `n_rows` rows, where these can be [`Dense`].
    fn dense(&mut self, n_rows: usize) -> Option<(Ptr, Ptr)> {
        (n_rows >= DENSE_FROM).then(|| (self.bytes(PANEL_BYTES), self.bytes(dense::WORKSPACE_BYTES)))
    }

    fn f32(&mut self, n: usize) -> Ptr {
        self.bytes(4 * n)
    }

    /// `n` activations in every format that one of `weights` wants.
    fn forms(&mut self, n: usize, weights: &[&DeviceWeight], math: Math) -> Forms {
        let mut forms = Forms::default();
        for w in weights {
            let form = form(w.ty, w.n_cols, math);
            let (ptr, bytes) = match form.written() {
                Form::F16 => (&mut forms.written.f16, 2),
                Form::Bf16 => (&mut forms.written.bf16, 2),
                _ => (&mut forms.written.f32, 4),
            };
            if *ptr == Ptr::NULL {
                *ptr = self.bytes(n * bytes);
            }
            if let Form::Int8(group) = form
                && forms.codes(group).codes == Ptr::NULL
            {
                let codes = Codes { codes: self.bytes(n), heads: self.bytes(n / 32 * 8) };
                forms.codes[usize::from(group == 256)] = codes;
            }
        }
        forms
    }
}

/// Buffers of an attention block.
struct AttentionBuffers {
    h: Forms,
    q: Ptr,
    k: Ptr,
    v: Ptr,
    rotated: Ptr,
    out: Forms,
}

impl AttentionBuffers {
    fn new(s: &mut Scratch, b: &Attention<DeviceWeight>, n: usize, math: Math) -> Self {
        let kv = n * b.shape.n_kv_heads * b.shape.head_dim;
        let q = n * b.shape.n_heads * b.shape.head_dim;
        Self {
            h: s.forms(n * b.shape.n_embd, &[&b.attn_q.weight, &b.attn_k.weight, &b.attn_v.weight], math),
            q: s.f32(q * if b.shape.gated { 2 } else { 1 }),
            k: s.f32(kv),
            v: s.f32(kv),
            rotated: s.f32(q),
            out: s.forms(q, &[&b.attn_output.weight], math),
        }
    }
}

/// Buffers of a delta-net block.
struct DeltaBuffers {
    h: Forms,
    u: Ptr,
    z: Ptr,
    alpha: Ptr,
    beta: Ptr,
    qk: Ptr,
    v: Ptr,
    uw: Ptr,
    p: Ptr,
    g: Ptr,
    o: Ptr,
    out: Forms,
}

impl DeltaBuffers {
    fn new(s: &mut Scratch, b: &DeltaNet<DeviceWeight>, n: usize, n_chunks: usize, chunk: usize, math: Math) -> Self {
        let d = &b.shape;
        let weights = [&b.attn_qkv.weight, &b.attn_gate.weight, &b.ssm_beta.weight, &b.ssm_alpha.weight];
        let per_chunk = n_chunks * d.n_v_heads * chunk;
        Self {
            h: s.forms(n * d.n_embd, &weights, math),
            u: s.f32(n * d.n_channels()),
            z: s.f32(n * d.n_value()),
            alpha: s.f32(n * d.n_v_heads),
            beta: s.f32(n * d.n_v_heads),
            qk: s.f32(n * 2 * d.n_k_heads * d.head_dim),
            v: s.f32(n * d.n_value()),
            uw: s.f32(2 * per_chunk * d.head_dim),
            p: s.f32(per_chunk * chunk),
            g: s.f32(per_chunk),
            o: s.f32(n * d.n_value()),
            out: s.forms(n * d.n_value(), &[&b.ssm_out.weight], math),
        }
    }
}

/// Buffers of `silu(gate) * up` for `n` rows: the result, and the factors where they are not made in one go.
struct PairBuffers {
    factors: Option<(Ptr, Ptr)>,
    /// The factors in 16 bits, for [`Dense`].
    halves: Option<(Ptr, Ptr)>,
    out: Forms,
}

/// Whether gate and up run as one product.
fn is_pair(gate: &Linear<DeviceWeight>, up: &Linear<DeviceWeight>, down: &Linear<DeviceWeight>, math: Math) -> bool {
    let [of_gate, of_down] = [gate, down].map(|l| form(l.weight.ty, l.weight.n_cols, math));
    let fits = (of_gate.is_half() && of_down.is_half()) || (of_gate.is_int8() && of_down.is_int8());
    gate.weight.ty == up.weight.ty && fits && gate.bias.is_none() && up.bias.is_none()
}

impl PairBuffers {
    fn new(
        s: &mut Scratch,
        (gate, up, down): (&Linear<DeviceWeight>, &Linear<DeviceWeight>, &Linear<DeviceWeight>),
        n: usize,
        n_ff: usize,
        is_stack: bool,
        math: Math,
    ) -> Self {
        let is_pair = is_pair(gate, up, down, math);
        let factors = (!is_pair).then(|| (s.f32(n * n_ff), s.f32(n * n_ff)));
        let is_half = form(down.weight.ty, down.weight.n_cols, math).is_half();
        let is_dense = is_pair && is_half && !is_stack && n >= DENSE_FROM;
        let halves = is_dense.then(|| (s.bytes(2 * n * n_ff), s.bytes(2 * n * n_ff)));
        Self { factors, halves, out: s.forms(n * n_ff, &[&down.weight], math) }
    }
}

/// Buffers of a mixture of experts.
struct MoeBuffers {
    h: Forms,
    logits: Ptr,
    expert: Ptr,
    weight: Ptr,
    slot: Ptr,
    token: Ptr,
    row: Ptr,
    count: Ptr,
    tiles: [Ptr; 2],
    n_tiles: [Ptr; 2],
    pair: PairBuffers,
    y: Ptr,
    shared: Option<(PairBuffers, Ptr)>,
}

impl MoeBuffers {
    fn new(s: &mut Scratch, b: &Moe<DeviceWeight>, n: usize, math: Math) -> Self {
        let m = &b.shape;
        let n_rows = n * m.n_used;
        let mut weights = vec![&b.ffn_gate_inp, &b.ffn_gate_exps.weight, &b.ffn_up_exps.weight];
        if let Some(shared) = &b.shared {
            weights.extend([&shared.ffn_gate_shexp.weight, &shared.ffn_up_shexp.weight]);
            weights.extend(&shared.ffn_gate_inp_shexp);
        }
        let tiles = max_tiles(n_rows, m.n_experts, TILES[0]);
        Self {
            h: s.forms(n * m.n_embd, &weights, math),
            logits: s.f32(n * m.n_experts),
            expert: s.f32(n_rows),
            weight: s.f32(n_rows),
            slot: s.bytes(8 * n_rows),
            token: s.f32(n_rows),
            row: s.f32(n_rows),
            count: s.f32(m.n_experts),
            tiles: [s.bytes(TILE_BYTES * tiles), s.bytes(TILE_BYTES * tiles)],
            n_tiles: [s.f32(1), s.f32(1)],
            pair: PairBuffers::new(s, (&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps), n_rows, m.n_ff, true, math),
            y: s.f32(n_rows * m.n_embd),
            shared: b.shared.as_ref().map(|e| {
                let linears = (&e.ffn_gate_shexp, &e.ffn_up_shexp, &e.ffn_down_shexp);
                (PairBuffers::new(s, linears, n, m.n_ff_shared, false, math), s.f32(n * m.n_embd))
            }),
        }
    }
}

/// Most tiles of `height` rows that `n_rows` rows of `n_experts` experts make.
fn max_tiles(n_rows: usize, n_experts: usize, height: usize) -> usize {
    n_rows / height + n_experts.min(n_rows)
}

/// Rows of experts, sorted: what [`Prompt::gemm`] needs beside the projection of one expert ([`routed`]).
#[derive(Clone, Copy)]
struct Experts {
    /// Row of x of each row, or null.
    gather: Ptr,
    tiles: Ptr,
    n_tiles: Ptr,
    n_experts: usize,
}

/// Functions of a product with one type.
struct Gemm {
    f32: Option<Function>,
    f32_many: Option<Function>,
    decode: Option<Function>,
    /// By [`TILES`]; empty for F32 weights.
    plain: Vec<Function>,
    pair: Vec<Function>,
}

/// Functions of the attention blocks of one shape.
struct AttentionFunctions {
    prepare: Function,
    attend: Function,
    is_flash: bool,
    shared: usize,
}

/// Functions of the delta-net blocks of one shape.
struct DeltaFunctions {
    conv: Function,
    conv_state: Function,
    chunk: Function,
    scan: Function,
    chunk_shared: usize,
    scan_shared: usize,
}

/// The functions of a model's blocks for many tokens.
pub(crate) struct Prompt {
    math: Math,
    /// Whether [`Dense`] is worth its memory on this chip.
    wants_dense: bool,
    dense: OnceLock<Option<Dense>>,
    chunk: usize,
    gemm: HashMap<TensorType, Gemm>,
    attention: Vec<(AttentionKey, AttentionFunctions)>,
    delta: Vec<(DeltaKey, DeltaFunctions)>,
    norm: Function,
    round: Function,
    swiglu: Function,
    swiglu_halves: Function,
    gated_norm: Function,
    choose: Function,
    sort: Function,
    combine: Function,
}

/// What attention kernels are specialised on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct AttentionKey {
    head_dim: usize,
    n_heads: usize,
    n_kv_heads: usize,
    gated: bool,
    n_rot: usize,
    adjacent: bool,
    qk_norm: bool,
    kv: KvDtype,
}

impl AttentionKey {
    fn new(b: &Attention<DeviceWeight>, kv: KvDtype) -> Self {
        let AttentionShape { head_dim, n_heads, n_kv_heads, gated, ref rope, .. } = b.shape;
        let (n_rot, adjacent) = (rope.n_rot, rope.style == RopeStyle::Adjacent);
        Self { head_dim, n_heads, n_kv_heads, gated, n_rot, adjacent, qk_norm: b.attn_q_norm.is_some(), kv }
    }

    fn is_flash(&self, math: Math) -> bool {
        math.bf16 && self.kv == KvDtype::Bf16 && self.head_dim.is_multiple_of(64) && self.head_dim <= 256
    }

    fn rows(&self, math: Math) -> usize {
        if self.is_flash(math) { FLASH_ROWS } else { PLAIN_ROWS }
    }

    fn program(&self) -> Program {
        Program::new("attention_prompt.cu", include_str!("attention_prompt.cu"))
            .args::<AttentionPromptArgs>("ATTENTION_PROMPT_ARGS")
            .define("HEAD_DIM", self.head_dim)
            .define("N_HEADS", self.n_heads)
            .define("N_KV_HEADS", self.n_kv_heads)
            .define("GATED", u8::from(self.gated))
            .define("N_ROT", self.n_rot)
            .define("ROPE_ADJACENT", u8::from(self.adjacent))
            .define("QK_NORM", u8::from(self.qk_norm))
            .define("KV_BF16", u8::from(self.kv == KvDtype::Bf16))
    }
}

/// What delta-net kernels are specialised on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct DeltaKey {
    head_dim: usize,
    n_k_heads: usize,
    n_v_heads: usize,
    conv_kernel: usize,
    tiled: bool,
}

impl DeltaKey {
    fn new(shape: &DeltaNetShape) -> Self {
        let DeltaNetShape { head_dim, n_k_heads, n_v_heads, conv_kernel, head_order, .. } = *shape;
        Self { head_dim, n_k_heads, n_v_heads, conv_kernel, tiled: head_order == HeadOrder::Tiled }
    }

    fn program(&self) -> Program {
        Program::new("delta_net_prompt.cu", include_str!("delta_net_prompt.cu"))
            .args::<DeltaPromptArgs>("DELTA_PROMPT_ARGS")
            .define("HEAD_DIM", self.head_dim)
            .define("N_K_HEADS", self.n_k_heads)
            .define("N_V_HEADS", self.n_v_heads)
            .define("CONV_K", self.conv_kernel)
            .define("HEAD_TILED", u8::from(self.tiled))
            .define("SCAN_COLUMNS", self.scan_columns())
    }

    /// Value columns of a block of `delta_scan`: fewer where there are too few heads to fill a large chip.
    fn scan_columns(&self) -> usize {
        if self.n_v_heads <= 24 { 16 } else { 32 }
    }

    /// Bytes of shared memory of delta_chunk and delta_scan.
    fn shared(&self, chunk: usize) -> (usize, usize) {
        let width = self.head_dim.next_power_of_two().max(16);
        let ring = width.max(chunk) + 4;
        let column = self.scan_columns() + 8;
        let chunk_floats = 2 * chunk * (width + 4) + chunk * (chunk + 4) + 2 * chunk;
        (4 * chunk_floats, 4 * (2 * chunk * ring + width * column + chunk * column + chunk))
    }
}

fn program_rows() -> Program {
    Program::new("prompt.cu", include_str!("prompt.cu"))
        .args::<RowsArgs>("ROWS_ARGS")
        .args::<RoundArgs>("ROUND_ARGS")
        .args::<SwigluArgs>("SWIGLU_ARGS")
        .args::<SwigluHalvesArgs>("SWIGLU_HALVES_ARGS")
        .args::<GatedNormArgs>("GATED_NORM_ARGS")
        .args::<ExpertArgs>("EXPERT_ARGS")
        .args::<CombineArgs>("COMBINE_ARGS")
}

fn program_gemm(ty: TensorType, is_pair: bool, rows: usize) -> Program {
    Program::new("gemm.cu", include_str!("gemm.cu"))
        .args::<GemmArgs>("GEMM_ARGS")
        .args::<DecodeRowsArgs>("DECODE_ROWS_ARGS")
        .define("TYPE", ty as u32)
        .define("PAIR", u8::from(is_pair))
        .define("ROWS", rows)
}

/// Types that have a plain f32 product.
fn has_f32(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

/// Types of the matrices of `blocks` that are multiplied with, each once.
fn matrix_types(blocks: &[Block<DeviceWeight>]) -> Vec<TensorType> {
    let mut types = vec![TensorType::F32];
    for block in blocks.iter().filter(|b| !matches!(b, Block::Embed(_))) {
        block.for_each(&mut |w| {
            if !types.contains(&w.ty) {
                types.push(w.ty);
            }
        });
    }
    types
}

/// A batch in device memory: the tables that every step has, and those of these kernels.
#[derive(Debug)]
pub(crate) struct Tables {
    n_tokens: usize,
    n_runs: usize,
    n_chunks: usize,
    /// `[n_tokens]` [`crate::ops::Row`].
    rows: Ptr,
    /// `[n_runs]` [`crate::ops::Run`].
    runs: Ptr,
    /// `[n_chunks]` first row, tokens, run, offset.
    chunks: Ptr,
    /// `[n_runs]`.
    first_chunk: Ptr,
    /// By rows of a block and query heads per KV head: `[..]` run, first.
    blocks: Vec<((usize, usize), Ptr, usize)>,
}

/// Bytes of [`Prompt::tables`] of any batch of up to `n_tokens` tokens in `n_sequences` runs.
pub(crate) fn table_bytes<W>(blocks: &[Block<W>], n_tokens: usize, n_sequences: usize) -> usize {
    let mut groups: Vec<usize> = Vec::new();
    for block in blocks {
        if let Block::Attention(b) = block
            && !groups.contains(&(b.shape.n_heads / b.shape.n_kv_heads))
        {
            groups.push(b.shape.n_heads / b.shape.n_kv_heads);
        }
    }
    let row_blocks: usize = groups.iter().map(|g| 8 * (n_tokens * g / PLAIN_ROWS + n_sequences + 1)).sum();
    let chunks = n_tokens / 32 + n_sequences;
    4 * n_sequences + 16 * chunks + row_blocks + (2 + groups.len()) * ALIGN
}

/// Bytes of scratch memory that any block needs for up to `n_tokens` tokens in `n_sequences` runs.
pub(crate) fn scratch_bytes(blocks: &[Block<Weight>], n_tokens: usize, n_sequences: usize) -> usize {
    let kinds = [false, true].into_iter().flat_map(|bf16| [false, true].map(|int8| Math { bf16, int8 }));
    kinds.map(|math| scratch_bytes_of(blocks, n_tokens, n_sequences, math)).max().unwrap_or(0)
}

fn scratch_bytes_of(blocks: &[Block<Weight>], n_tokens: usize, n_sequences: usize, math: Math) -> usize {
    let chunk = chunk_len(math);
    let bytes = |block: &Block<Weight>| {
        let block = &crate::backend::unplaced(block);
        let mut s = Scratch::new(Ptr::NULL.offset(ALIGN));
        if !math.int8 {
            s.dense(n_tokens);
        }
        match block {
            Block::Embed(_) => {}
            Block::Attention(b) => {
                AttentionBuffers::new(&mut s, b, n_tokens, math);
            }
            Block::DeltaNet(b) => {
                let n_chunks = n_tokens / chunk + n_sequences;
                DeltaBuffers::new(&mut s, b, n_tokens, n_chunks, chunk, math);
            }
            Block::Ffn(b) => {
                s.forms(n_tokens * b.shape.n_embd, &[&b.ffn_gate.weight, &b.ffn_up.weight], math);
                let linears = (&b.ffn_gate, &b.ffn_up, &b.ffn_down);
                PairBuffers::new(&mut s, linears, n_tokens, b.shape.n_ff, false, math);
            }
            Block::Moe(b) => {
                MoeBuffers::new(&mut s, b, n_tokens, math);
            }
            Block::Head(b) => {
                s.forms(n_tokens * b.shape.n_embd, &[&b.output.weight], math);
            }
        }
        s.ranges.total()
    };
    blocks.iter().map(bytes).max().unwrap_or(0)
}

/// Tokens of a chunk of the delta rule: what fits the shared memory of a chip.
fn chunk_len(math: Math) -> usize {
    if math.bf16 { 64 } else { 32 }
}

/// One launch of a block: the device, and the memory for [`Dense`] products.
struct Call<'a> {
    device: &'a Device,
    dense: Option<(&'a Dense, Ptr, Ptr)>,
}

impl Prompt {
    /// Takes the memory for [`Dense`] products of `n_rows` rows from `s`.
    fn call<'a>(&'a self, device: &'a Device, s: &mut Scratch, n_rows: usize) -> Call<'a> {
        let memory = if self.math.int8 { None } else { s.dense(n_rows) };
        let library = || self.dense.get_or_init(|| if self.wants_dense { Dense::load() } else { None }).as_ref();
        let dense = memory.and_then(|(panel, workspace)| library().map(|dense| (dense, panel, workspace)));
        Call { device, dense }
    }

    /// The functions of `blocks` on a chip of compute capability `arch`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(
        linker: &mut Linker,
        blocks: &[Block<DeviceWeight>],
        kv: KvDtype,
        arch: (i32, i32),
        products: Products,
    ) -> Result<Self, Error> {
        let math = Math { bf16: arch >= (8, 0), int8: products == Products::Int8 };
        let chunk = chunk_len(math);
        let mut gemm = HashMap::new();
        for ty in matrix_types(blocks) {
            let mut of = |is_pair| {
                let is_int8 = math.int8 && ty.is_quantised();
                let mut function = |rows: &usize| {
                    let (entry, shared) = match *rows {
                        rows if is_int8 => ("gemm_int8", int8_shared(rows, math.stages())),
                        rows if rows == TILES[2] => ("gemm_tile", tile_shared(rows, math)),
                        _ => ("gemm_rows", 0),
                    };
                    let mut program = program_gemm(ty, is_pair, *rows);
                    if is_int8 {
                        program = program.define("INT8", 1).define("INT8_SHARED", int8_shared(*rows, 3));
                    }
                    linker.function(program, entry, shared)
                };
                let of_int8 = tiles_int8(ty);
                let tiles: &[usize] = match ty {
                    TensorType::F32 => &[],
                    _ if is_int8 => &of_int8,
                    _ => &TILES,
                };
                tiles.iter().map(&mut function).collect::<Result<Vec<_>, _>>()
            };
            let (plain, pair) = (of(false)?, of(true)?);
            let f32_many = (ty == TensorType::F32)
                .then(|| linker.function(program_gemm(ty, false, 0), "gemm_f32_tile", 0))
                .transpose()?;
            let f32 = has_f32(ty).then(|| linker.function(program_gemm(ty, false, 0), "gemm_f32", 0)).transpose()?;
            let decode =
                ty.is_quantised().then(|| linker.function(program_gemm(ty, false, 1), "decode_rows", 0)).transpose()?;
            gemm.insert(ty, Gemm { f32, f32_many, decode, plain, pair });
        }
        let (mut attention, mut delta) = (Vec::new(), Vec::new());
        for block in blocks {
            match block {
                Block::Attention(b) => {
                    let key = AttentionKey::new(b, kv);
                    if attention.iter().all(|(k, _)| *k != key) {
                        let is_flash = key.is_flash(math);
                        let (entry, shared) = if is_flash {
                            ("attention_flash", 3 * FLASH_ROWS * key.head_dim * 2)
                        } else {
                            ("attention_plain", 3 * PLAIN_ROWS * (key.head_dim + 1) * 4)
                        };
                        let prepare = linker.function(key.program(), "attention_prepare", 0)?;
                        let attend = linker.function(key.program(), entry, shared)?;
                        attention.push((key, AttentionFunctions { prepare, attend, is_flash, shared }));
                    }
                }
                Block::DeltaNet(b) => {
                    let key = DeltaKey::new(&b.shape);
                    if delta.iter().all(|(k, _)| *k != key) {
                        let (chunk_shared, scan_shared) = key.shared(chunk);
                        let mut function = |entry, shared| linker.function(key.program(), entry, shared);
                        let functions = DeltaFunctions {
                            conv: function("delta_conv", 0)?,
                            conv_state: function("delta_conv_state", 0)?,
                            chunk: function("delta_chunk", chunk_shared)?,
                            scan: function("delta_scan", scan_shared)?,
                            chunk_shared,
                            scan_shared,
                        };
                        delta.push((key, functions));
                    }
                }
                _ => {}
            }
        }
        let mut function = |entry| linker.function(program_rows(), entry, 0);
        Ok(Self {
            math,
            wants_dense: products == Products::Library,
            dense: OnceLock::new(),
            chunk,
            gemm,
            attention,
            delta,
            norm: function("norm_rows")?,
            round: function("round_rows")?,
            swiglu: function("swiglu_rows")?,
            swiglu_halves: function("swiglu_halves")?,
            gated_norm: function("gated_norm_rows")?,
            choose: function("expert_choose")?,
            sort: function("expert_sort")?,
            combine: function("expert_combine")?,
        })
    }

    /// Writes what the kernels need to know of `batch`, beside its rows and runs, to `memory`, which holds
    /// [`table_bytes`], in stream order.
    ///
    /// # Errors
    /// What the driver says.
    pub fn tables<'b>(
        &self,
        device: &Device,
        batch: &Batch,
        blocks: impl IntoIterator<Item = &'b Block<DeviceWeight>>,
        kv: KvDtype,
        (rows, runs): (Ptr, Ptr),
        memory: Ptr,
    ) -> Result<Tables, Error> {
        let mut bytes: Vec<u8> = Vec::new();
        let mut put = |values: &[u32]| {
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            let at = memory.offset(bytes.len());
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            at
        };
        let (mut chunks, mut first_chunk, mut first) = (vec![], vec![], 0);
        for (i, s) in batch.sequences.iter().enumerate() {
            first_chunk.push((chunks.len() / 4) as u32);
            for offset in (0..s.n_tokens).step_by(self.chunk) {
                let n = self.chunk.min(s.n_tokens - offset);
                chunks.extend([first + offset, n, i, offset].map(|v| v as u32));
            }
            first += s.n_tokens;
        }
        let mut tables = Tables {
            n_tokens: batch.tokens.len(),
            n_runs: batch.sequences.len(),
            n_chunks: chunks.len() / 4,
            rows,
            runs,
            chunks: put(&chunks),
            first_chunk: put(&first_chunk),
            blocks: Vec::new(),
        };
        for block in blocks {
            let Block::Attention(b) = block else { continue };
            let height = AttentionKey::new(b, kv).rows(self.math);
            let key = (height, b.shape.n_heads / b.shape.n_kv_heads);
            if tables.blocks.iter().any(|(k, ..)| *k == key) {
                continue;
            }
            // Long rows first: the last blocks to run are short.
            let of = |(i, s): (usize, &tandem_spec::Sequence)| {
                let position = s.position;
                (0..s.n_tokens * key.1).step_by(height).map(move |first| (position + first / key.1, i, first))
            };
            let mut list: Vec<_> = batch.sequences.iter().enumerate().flat_map(of).collect();
            list.sort_by_key(|(length, ..)| std::cmp::Reverse(*length));
            let values: Vec<u32> = list.iter().flat_map(|(_, i, first)| [*i as u32, *first as u32]).collect();
            tables.blocks.push((key, put(&values), list.len()));
        }
        // SAFETY: `memory` holds the tables; a copy from pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(memory.0, &bytes, device.stream()) }.during("copying a batch")?;
        Ok(tables)
    }

    /// Runs an attention block over `x` `[n_tokens, n_embd]` f32, in place. `keys`, `values`: `[n_slots, n_ctx,
    /// n_kv_heads, head_dim]`; `constants` holds [`tandem_spec::Rope::frequencies`];
    /// `scratch` holds [`scratch_bytes`].
    ///
    /// # Errors
    /// What the driver says.
    pub fn attention(
        &self,
        device: &Device,
        b: &Attention<DeviceWeight>,
        t: &Tables,
        x: Ptr,
        (keys, values, n_ctx, kv): (Ptr, Ptr, usize, KvDtype),
        constants: Constants,
        scratch: Ptr,
    ) -> Result<(), Error> {
        let key = AttentionKey::new(b, kv);
        let (_, f) = self.attention.iter().find(|(k, _)| *k == key).expect("the block is one of those of `new`");
        let shape = &b.shape;
        let mut s = Scratch::new(scratch);
        let c = &self.call(device, &mut s, t.n_tokens);
        let s = AttentionBuffers::new(&mut s, b, t.n_tokens, self.math);
        self.norm_rows(c, x, &b.attn_norm, Ptr::NULL, &s.h, t.n_tokens, shape.rms_eps)?;
        for (linear, y) in [(&b.attn_q, s.q), (&b.attn_k, s.k), (&b.attn_v, s.v)] {
            self.gemm(c, linear, &s.h, t.n_tokens, y, None, false)?;
        }
        let out_form = form(b.attn_output.weight.ty, b.attn_output.weight.n_cols, self.math);
        let (rows, group) = (key.rows(self.math), shape.n_heads / shape.n_kv_heads);
        let (_, blocks, n_blocks) =
            t.blocks.iter().find(|(k, ..)| *k == (rows, group)).expect("the tables cover the block");
        let ptr = |w: &Option<DeviceWeight>| w.as_ref().map_or(Ptr::NULL, |w| w.ptr);
        let args = AttentionPromptArgs {
            sequences: t.runs,
            blocks: *blocks,
            rows: t.rows,
            q: s.q,
            k: s.k,
            v: s.v,
            q_norm: ptr(&b.attn_q_norm),
            k_norm: ptr(&b.attn_k_norm),
            freq: constants.freq,
            k_cache: keys,
            v_cache: values,
            q_rotated: s.rotated,
            out: s.out.get(out_form.written()),
            n_ctx: n_ctx as u64,
            rope_magnitude: constants.magnitude as f32,
            eps: shape.rms_eps,
            flash: i32::from(f.is_flash),
            out_kind: out_form.kind(),
        };
        let prepare = Launch::grid(t.n_tokens, (shape.n_heads + 2 * shape.n_kv_heads).div_ceil(4), 1, 128);
        let threads = if f.is_flash { 128 } else { 256 };
        let attend = Launch::grid(*n_blocks, shape.n_kv_heads, 1, threads).shared(f.shared);
        // SAFETY: the buffers hold n_tokens rows; the batch was checked, so slots and positions lie in the caches.
        unsafe {
            f.prepare.launch(device, prepare, &args)?;
            f.attend.launch(device, attend, &args)?;
        }
        self.round(c, &s.out, t.n_tokens * shape.n_heads * shape.head_dim)?;
        self.gemm(c, &b.attn_output, &s.out, t.n_tokens, x, None, true)
    }

    /// Runs a delta-net block over `x` `[n_tokens, n_embd]` f32, in place. `ring`: `[n_slots, conv_kernel,
    /// n_channels]` f32; `state`: `[n_slots, n_v_heads, S, S]` f32.
    ///
    /// # Errors
    /// What the driver says.
    pub fn delta_net(
        &self,
        device: &Device,
        b: &DeltaNet<DeviceWeight>,
        t: &Tables,
        x: Ptr,
        [ring, state]: [Ptr; 2],
        scratch: Ptr,
    ) -> Result<(), Error> {
        let key = DeltaKey::new(&b.shape);
        let (_, f) = self.delta.iter().find(|(k, _)| *k == key).expect("the block is one of those of `new`");
        let (d, n) = (&b.shape, t.n_tokens);
        let mut s = Scratch::new(scratch);
        let c = &self.call(device, &mut s, n);
        let s = DeltaBuffers::new(&mut s, b, n, t.n_chunks, self.chunk, self.math);
        self.norm_rows(c, x, &b.attn_norm, Ptr::NULL, &s.h, n, d.rms_eps)?;
        let projections = [(&b.attn_qkv, s.u), (&b.attn_gate, s.z), (&b.ssm_beta, s.beta), (&b.ssm_alpha, s.alpha)];
        for (linear, y) in projections {
            self.gemm(c, linear, &s.h, n, y, None, false)?;
        }
        let args = DeltaPromptArgs {
            chunks: t.chunks,
            sequences: t.runs,
            first_chunk: t.first_chunk,
            u: s.u,
            alpha: s.alpha,
            beta: s.beta,
            conv_w: b.ssm_conv1d.ptr,
            ssm_a: b.ssm_a.ptr,
            ssm_dt: b.ssm_dt.ptr,
            ring,
            state,
            qk: s.qk,
            v: s.v,
            uw: s.uw,
            p: s.p,
            g: s.g,
            o: s.o,
            eps: d.rms_eps,
            pad: 0,
        };
        let n_heads = 2 * d.n_k_heads + d.n_v_heads;
        // SAFETY: the buffers hold n_tokens rows and n_chunks chunks; slots of a checked batch lie in the states.
        unsafe {
            f.conv.launch(device, Launch::grid(t.n_chunks, n_heads, 1, 256), &args)?;
            let channels = Launch::grid(t.n_runs, d.n_channels().div_ceil(256), 1, 256);
            f.conv_state.launch(device, channels, &args)?;
            let chunks = Launch::grid(t.n_chunks, d.n_v_heads, 1, DELTA_THREADS).shared(f.chunk_shared);
            f.chunk.launch(device, chunks, &args)?;
            let columns = d.head_dim.div_ceil(key.scan_columns());
            let scan = Launch::grid(columns, d.n_v_heads, t.n_runs, DELTA_THREADS).shared(f.scan_shared);
            f.scan.launch(device, scan, &args)?;
        }
        let n_rows = n * d.n_v_heads;
        let (n_i32, eps) = (n_rows as i32, d.rms_eps);
        let norm = GatedNormArgs {
            o: s.o,
            z: s.z,
            w: b.ssm_norm.ptr,
            y: s.out.written,
            n_rows: n_i32,
            s: d.head_dim as i32,
            eps,
            pad: 0,
        };
        // SAFETY: all buffers hold n_tokens * n_v_heads rows of head_dim.
        unsafe { self.gated_norm.launch(device, Launch::new(n_rows.div_ceil(8), 256), &norm)? };
        self.round(c, &s.out, n * d.n_value())?;
        self.gemm(c, &b.ssm_out, &s.out, n, x, None, true)
    }

    /// Runs a feed-forward block over `x` `[n_tokens, n_embd]` f32, in place: `b`, which may have no rows, and the
    /// parts of it that are streamed.
    ///
    /// # Errors
    /// What the driver says.
    pub fn ffn(
        &self,
        device: &Device,
        b: &Ffn<DeviceWeight>,
        streamed: Option<Parts>,
        t: &Tables,
        x: Ptr,
        scratch: Ptr,
    ) -> Result<(), Error> {
        let n = t.n_tokens;
        let mut s = Scratch::new(scratch);
        let c = &self.call(device, &mut s, n);
        let h = s.forms(n * b.shape.n_embd, &[&b.ffn_gate.weight, &b.ffn_up.weight], self.math);
        self.norm_rows(c, x, &b.ffn_norm, Ptr::NULL, &h, n, b.shape.rms_eps)?;
        let add = |b: &Ffn<DeviceWeight>| {
            let linears = (&b.ffn_gate, &b.ffn_up, &b.ffn_down);
            let pair = PairBuffers::new(&mut s.clone(), linears, n, b.shape.n_ff, false, self.math);
            self.gemm_pair(c, linears, &h, n, b.shape.n_ff, &pair, None)?;
            self.gemm(c, &b.ffn_down, &pair.out, n, x, None, true)
        };
        if b.shape.n_ff > 0 {
            add(b)?;
        }
        let Some(mut parts) = streamed else { return Ok(()) };
        while let Some(part) = parts.next_part()? {
            let Block::Ffn(b) = &part.block else { unreachable!("a share is of its block's kind") };
            add(b)?;
        }
        Ok(())
    }

    /// Runs a mixture of experts over `x` `[n_tokens, n_embd]` f32, in place: those experts that have a slot in `table`
    /// `[n_experts]` u64, the shared one, and those that are streamed;
    /// `between` queues what comes between the choice of experts and their products.
    ///
    /// # Errors
    /// What the driver says.
    pub fn moe(
        &self,
        device: &Device,
        b: &Moe<DeviceWeight>,
        streamed: Option<Parts>,
        t: &Tables,
        x: Ptr,
        table: Ptr,
        scratch: Ptr,
        between: &mut dyn FnMut(Chosen) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (m, n) = (&b.shape, t.n_tokens);
        let n_rows = n * m.n_used;
        let mut s = Scratch::new(scratch);
        let c = &self.call(device, &mut s, n);
        let s = MoeBuffers::new(&mut s, b, n, self.math);
        self.norm_rows(c, x, &b.ffn_norm, Ptr::NULL, &s.h, n, m.rms_eps)?;
        let bare = |w: &DeviceWeight| Linear { weight: *w, scale: None, bias: None };
        self.gemm(c, &bare(&b.ffn_gate_inp), &s.h, n, s.logits, None, false)?;
        // SAFETY: `count` holds n_experts numbers.
        unsafe { result::memset_d8_async(s.count.0, 0, 4 * m.n_experts, device.stream()) }.during("clearing counts")?;
        // With those that are streamed, all experts are here.
        let streamed = streamed.and_then(|parts| parts.table().map(|table| (parts, table)));
        let args = ExpertArgs {
            logits: s.logits,
            table: if streamed.is_some() { Ptr::NULL } else { table },
            expert: s.expert,
            weight: s.weight,
            slot: s.slot,
            token: s.token,
            row: s.row,
            count: s.count,
            tiles: Ptr::NULL,
            n_tiles: Ptr::NULL,
            n_tokens: n as i32,
            n_experts: m.n_experts as i32,
            n_used: m.n_used as i32,
            height: 0,
            first_expert: 0,
            pad: 0,
        };
        let choose = Launch::new(n.div_ceil(8), 256).shared(8 * 4 * m.n_experts);
        // SAFETY: the buffers hold n_tokens rows of n_experts logits and n_used choices.
        unsafe { self.choose.launch(device, choose, &args)? };
        let (ids, weights) = (s.expert, s.weight);
        between(Chosen { ids, weights, table, counts: s.count, n_used: m.n_used, stride: m.n_used })?;
        // Outputs of those of `experts` that have a slot in `table`, in the sorted order of all.
        let multiply = |b: &Moe<DeviceWeight>, table: Ptr, experts: std::ops::Range<usize>| {
            let per_expert = n_rows.div_ceil(m.n_experts);
            let [gate, up, down] = &routed(b);
            let heights = [gate, down].map(|l| self.tile(&l.weight, l.weight.n_rows, per_expert, m.n_experts > 1).1);
            let mut sorted = [0, 0];
            for i in 0..2 {
                if i == 1 && heights[0] == heights[1] {
                    continue;
                }
                sorted[i] = i;
                let (tiles, n_tiles) = (s.tiles[i], s.n_tiles[i]);
                let (height, first_expert) = (heights[i] as i32, experts.start as i32);
                let args = ExpertArgs { table, tiles, n_tiles, height, first_expert, ..args };
                // SAFETY: as above; `tiles` holds the most tiles of the lowest height.
                unsafe { self.sort.launch(device, Launch::new(experts.len(), 256), &args)? };
            }
            let [of_pair, of_down] = sorted.map(|i| {
                let (tiles, n_tiles) = (s.tiles[i], s.n_tiles[i]);
                Experts { gather: Ptr::NULL, tiles, n_tiles, n_experts: m.n_experts }
            });
            let of_pair = Experts { gather: s.token, ..of_pair };
            self.gemm_pair(c, (gate, up, down), &s.h, n_rows, m.n_ff, &s.pair, Some(of_pair))?;
            self.gemm(c, down, &s.pair.out, n_rows, s.y, Some(of_down), false)
        };
        let all_come = streamed.as_ref().is_some_and(|(parts, _)| parts.are_all());
        if !all_come && (streamed.is_none() || !b.experts.is_empty()) {
            multiply(b, table, 0..m.n_experts)?;
        }
        let (mut shared_y, mut shared_gate) = (Ptr::NULL, Ptr::NULL);
        if let (Some(shared), Some((pair, y))) = (&b.shared, &s.shared) {
            let linears = (&shared.ffn_gate_shexp, &shared.ffn_up_shexp, &shared.ffn_down_shexp);
            self.gemm_pair(c, linears, &s.h, n, m.n_ff_shared, pair, None)?;
            self.gemm(c, &shared.ffn_down_shexp, &pair.out, n, *y, None, false)?;
            shared_y = *y;
            shared_gate = shared.ffn_gate_inp_shexp.as_ref().map_or(Ptr::NULL, |w| w.ptr);
        }
        if let Some((mut parts, table)) = streamed {
            while let Some(part) = parts.next_part()? {
                let Block::Moe(b) = &part.block else { unreachable!("a share is of its block's kind") };
                multiply(b, table, part.experts.clone())?;
            }
        }
        let args = CombineArgs {
            x,
            y: s.y,
            row: s.row,
            weight: s.weight,
            slot: s.slot,
            shared: shared_y,
            h: s.h.get(Form::F32),
            shared_gate,
            n: m.n_embd as i32,
            n_used: m.n_used as i32,
        };
        // SAFETY: the buffers hold n_tokens rows, `y` n_used times as many.
        unsafe { self.combine.launch(device, Launch::new(n, 256), &args) }
    }

    /// Logits `[n_wanted, n_vocab]` f32 of the rows `wanted` `[n_wanted]` of `x` `[n_tokens, n_embd]`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn head(
        &self,
        device: &Device,
        b: &Head<DeviceWeight>,
        (wanted, n_wanted): (Ptr, usize),
        x: Ptr,
        logits: Ptr,
        scratch: Ptr,
    ) -> Result<(), Error> {
        let mut s = Scratch::new(scratch);
        let c = &self.call(device, &mut s, n_wanted);
        let h = s.forms(n_wanted * b.shape.n_embd, &[&b.output.weight], self.math);
        self.norm_rows(c, x, &b.output_norm, wanted, &h, n_wanted, b.shape.rms_eps)?;
        self.gemm(c, &b.output, &h, n_wanted, logits, None, false)
    }

    fn norm_rows(
        &self,
        c: &Call,
        x: Ptr,
        w: &DeviceWeight,
        gather: Ptr,
        y: &Forms,
        n_rows: usize,
        eps: f32,
    ) -> Result<(), Error> {
        let args = RowsArgs { x, w: w.ptr, gather, y: y.written, n: w.n_cols as i32, eps };
        // SAFETY: x and y hold the rows; `gather` names rows of x.
        unsafe { self.norm.launch(c.device, Launch::new(n_rows, 256), &args)? };
        self.round(c, y, n_rows * w.n_cols)
    }

    /// Makes codes of the floats of `y`, `n` of them, where some product takes codes.
    fn round(&self, c: &Call, y: &Forms, n: usize) -> Result<(), Error> {
        for group in [32, 256] {
            let Codes { codes, heads } = y.codes(group);
            if codes == Ptr::NULL {
                continue;
            }
            let args = RoundArgs { x: y.written.f32, codes, heads, n: n as u64, group: group as u32, pad: 0 };
            // SAFETY: the buffers hold `n` elements, whole groups.
            unsafe { self.round.launch(c.device, Launch::new(n.div_ceil(2048), 256), &args)? };
        }
        Ok(())
    }

    /// Which tile, and how many rows it has, suits `n_rows` rows a weight: reading weights bounds few rows, the
    /// tensor cores many. The bounds are from an H200, where 32-row tiles are faster up to about 96 rows of one weight
    /// and, as there are many at a time, 32 rows of each of a stack.
    fn tile(&self, w: &DeviceWeight, n_out: usize, n_rows: usize, is_stack: bool) -> (usize, usize) {
        match form(w.ty, w.n_cols, self.math) {
            Form::F32 => return (0, TILE_F32),
            Form::Int8(_) => {
                let tiles = tiles_int8(w.ty);
                let i = usize::from(n_rows > tiles[0]);
                return (i, tiles[i]);
            }
            Form::F16 | Form::Bf16 => {}
        }
        let i = match n_rows {
            0..=8 => 0,
            9..=32 => 1,
            33..=96 if !is_stack => 1,
            _ if n_out <= FEW_OUTPUTS => 1,
            _ => 2,
        };
        (i, TILES[i])
    }

    /// `y = w x` (or `y +=`) for `n_rows` rows of x, of stacks of experts for the rows of each.
    fn gemm(
        &self,
        c: &Call,
        linear: &Linear<DeviceWeight>,
        x: &Forms,
        n_rows: usize,
        y: Ptr,
        experts: Option<Experts>,
        add: bool,
    ) -> Result<(), Error> {
        if self.is_dense(c, linear, n_rows, experts) {
            return self.gemm_dense(c, linear, x, n_rows, y, true, add);
        }
        self.launch_gemm(c, linear, None, x, n_rows, (y, Form::F32), experts, add)
    }

    /// Whether [`Prompt::gemm_dense`] takes a product and is faster.
    fn is_dense(&self, c: &Call, linear: &Linear<DeviceWeight>, n_rows: usize, experts: Option<Experts>) -> bool {
        let w = &linear.weight;
        c.dense.is_some()
            && experts.is_none()
            && n_rows >= DENSE_FROM
            && w.n_rows * w.n_cols >= DENSE_WEIGHTS
            && w.n_rows.is_multiple_of(8)
            && form(w.ty, w.n_cols, self.math).is_half()
            && linear.scale.is_none()
            && linear.bias.is_none()
    }

    /// `y = w x` (or `y +=`, f32 only) through [`Dense`], panel by panel of w.
    fn gemm_dense(
        &self,
        c: &Call,
        linear: &Linear<DeviceWeight>,
        x: &Forms,
        n_rows: usize,
        y: Ptr,
        y_f32: bool,
        add: bool,
    ) -> Result<(), Error> {
        let (dense, panel, workspace) = c.dense.expect("is_dense was asked");
        let w = &linear.weight;
        let form = form(w.ty, w.n_cols, self.math);
        let most = match self.gemm[&w.ty].decode {
            Some(_) => PANEL_BYTES / (2 * w.n_cols) / 128 * 128,
            None => w.n_rows,
        };
        // Panels of equal size, whole tiles of the product.
        let rows = w.n_rows.div_ceil(w.n_rows.div_ceil(most)).next_multiple_of(128);
        for first in (0..w.n_rows).step_by(rows) {
            let n_out = rows.min(w.n_rows - first);
            let shape =
                dense::Shape { n_rows, n_out, n_in: w.n_cols, ld_y: w.n_rows, is_f16: form == Form::F16, y_f32, add };
            let mut weights = w.ptr.offset(2 * first * w.n_cols);
            if let Some(decode) = self.gemm[&w.ty].decode {
                weights = panel;
                let n_units = n_out * w.n_cols / 32;
                let args = DecodeRowsArgs {
                    w: w.ptr,
                    out: panel,
                    n_blocks: w.n_blocks() as u64,
                    first: (first * w.n_cols / 32) as u64,
                    n_units: n_units as u64,
                };
                // SAFETY: the panel holds `rows` rows of 16-bit numbers.
                unsafe { decode.launch(c.device, Launch::new(n_units.div_ceil(256), 256), &args)? };
            }
            let y = y.offset(first * if y_f32 { 4 } else { 2 });
            // SAFETY: the panel, x and y hold the rows of the shape; the workspace is as large as it must be.
            unsafe { dense.multiply(c.device, shape, (weights, x.get(form), y), workspace)? };
        }
        Ok(())
    }

    /// `silu(gate x) * up x` in the format that `down` takes.
    fn gemm_pair(
        &self,
        c: &Call,
        (gate, up, down): (&Linear<DeviceWeight>, &Linear<DeviceWeight>, &Linear<DeviceWeight>),
        x: &Forms,
        n_rows: usize,
        n_ff: usize,
        buffers: &PairBuffers,
        experts: Option<Experts>,
    ) -> Result<(), Error> {
        let Some((g, u)) = buffers.factors else {
            let out = form(down.weight.ty, down.weight.n_cols, self.math);
            let y = buffers.out.get(out);
            if let (Some((g, u)), true) = (buffers.halves, out == form(gate.weight.ty, gate.weight.n_cols, self.math))
                && self.is_dense(c, gate, n_rows, experts)
                && self.is_dense(c, up, n_rows, experts)
            {
                self.gemm_dense(c, gate, x, n_rows, g, false, false)?;
                self.gemm_dense(c, up, x, n_rows, u, false, false)?;
                let n = n_rows * n_ff;
                let args =
                    SwigluHalvesArgs { gate: g, up: u, y, n: n as u64, is_f16: u32::from(out == Form::F16), pad: 0 };
                let launch = Launch::new((n / 2).div_ceil(256), 256);
                // SAFETY: the buffers hold n_rows rows of n_ff, an even number.
                return unsafe { self.swiglu_halves.launch(c.device, launch, &args) };
            }
            self.launch_gemm(c, gate, Some(up), x, n_rows, (buffers.out.get(out.written()), out), experts, false)?;
            return self.round(c, &buffers.out, n_rows * n_ff);
        };
        self.gemm(c, gate, x, n_rows, g, experts, false)?;
        self.gemm(c, up, x, n_rows, u, experts, false)?;
        let n = n_rows * n_ff;
        let args = SwigluArgs { gate: g, up: u, y: buffers.out.written, n: n as u64 };
        // SAFETY: the buffers hold n_rows rows of n_ff.
        unsafe { self.swiglu.launch(c.device, Launch::new(n.div_ceil(256), 256), &args)? };
        self.round(c, &buffers.out, n)
    }

    fn launch_gemm(
        &self,
        c: &Call,
        linear: &Linear<DeviceWeight>,
        up: Option<&Linear<DeviceWeight>>,
        x: &Forms,
        n_rows: usize,
        (y, y_form): (Ptr, Form),
        experts: Option<Experts>,
        add: bool,
    ) -> Result<(), Error> {
        let w = &linear.weight;
        let n_experts = experts.map_or(1, |e| e.n_experts);
        let n_out = w.n_rows;
        let functions = &self.gemm[&w.ty];
        let (i, mut height) = self.tile(w, n_out, n_rows.div_ceil(n_experts), n_experts > 1);
        let form = form(w.ty, w.n_cols, self.math);
        let (function, per_block) = match form {
            Form::F32 if functions.f32_many.is_some() && experts.is_none() && n_rows >= TILE_F32_MANY => {
                height = TILE_F32_MANY;
                (functions.f32_many.expect("asked in the guard"), 64)
            }
            Form::F32 => (functions.f32.expect("quantised rows are whole units of 32"), 16),
            Form::Int8(_) if up.is_some() => (functions.pair[i], 64),
            Form::Int8(_) => (functions.plain[i], 128),
            _ if up.is_some() => (functions.pair[i], [16, 16, 64][i]),
            _ => (functions.plain[i], [32, 32, 128][i]),
        };
        let ptr = |w: Option<&DeviceWeight>| w.map_or(Ptr::NULL, |w| w.ptr);
        let args = GemmArgs {
            w: w.ptr,
            w2: ptr(up.map(|l| &l.weight)),
            n_blocks: w.n_blocks() as u64,
            x: x.get(form),
            heads: if let Form::Int8(group) = form { x.codes(group).heads } else { Ptr::NULL },
            gather: experts.map_or(Ptr::NULL, |e| e.gather),
            tiles: experts.map_or(Ptr::NULL, |e| e.tiles),
            n_tiles: experts.map_or(Ptr::NULL, |e| e.n_tiles),
            y,
            scale: ptr(linear.scale.as_ref()),
            scale2: ptr(up.and_then(|l| l.scale.as_ref())),
            bias: ptr(linear.bias.as_ref()),
            n_rows: n_rows as i32,
            n_out: n_out as i32,
            n_in: w.n_cols as i32,
            ld_y: n_out as i32,
            add: i32::from(add),
            y_kind: y_form.kind(),
        };
        let tiles = if experts.is_some() { max_tiles(n_rows, n_experts, height) } else { n_rows.div_ceil(height) };
        let shared =
            if form.is_int8() { int8_shared(height, self.math.stages()) } else { tile_shared(height, self.math) };
        let shared = if form == Form::F32 { 0 } else { shared };
        let launch = Launch::grid(n_out.div_ceil(per_block), tiles, 1, 256).shared(shared);
        // SAFETY: the weight, n_rows rows of x (or those that `gather` names) and of y are where `args` says.
        unsafe { function.launch(c.device, launch, &args) }
    }
}

/// Bytes of shared memory of a product with tiles of `rows` rows.
fn tile_shared(rows: usize, math: Math) -> usize {
    if rows < TILES[2] { 0 } else { (2 * 128 + math.stages() * rows) * 128 }
}

/// Bytes of shared memory of `gemm_int8` with tiles of `rows` rows: as Shared in gemm.cu, for the type with the most
/// scales.
fn int8_shared(rows: usize, stages: usize) -> usize {
    (2 * 128 + stages * rows) * 64 + stages * 2 * rows * 8 + 2 * 2 * 4 * 128 * 4
}
