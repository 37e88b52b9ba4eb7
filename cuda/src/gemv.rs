//! Products of weights with one token or a few (`gemv.cu`): up to four matrices that share the input in one launch,
//! or gate and up with SwiGLU. Refuses more than four matrices and, for SwiGLU into a quantised product, widths that are
//! not whole units of 32.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::device::Device;
use crate::error::Error;
use crate::ops::{DeviceWeight, Input, Linker};
use tandem_spec::Linear;

/// Tokens of one launch of the wide variant.
const MANY: usize = 8;
/// Warps of a block.
const WARPS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    weight: Ptr,
    out: Ptr,
    scale: Ptr,
    bias: Ptr,
    n_blocks: u64,
    n_rows: u32,
    stride: u32,
    first_block: u32,
    add: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GemvArgs {
    segment: [Segment; 4],
    codes: Ptr,
    heads: Ptr,
    x: Ptr,
    codes_out: Ptr,
    heads_out: Ptr,
    n_tokens: u32,
    pad: u32,
}
// SAFETY: mirrors GemvArgs in gemv.cu, which compares sizes.
unsafe impl Args for GemvArgs {}

const NO_SEGMENT: Segment = Segment {
    weight: Ptr::NULL,
    out: Ptr::NULL,
    scale: Ptr::NULL,
    bias: Ptr::NULL,
    n_blocks: 0,
    n_rows: 0,
    stride: 0,
    first_block: u32::MAX,
    add: 0,
};

/// Rows a warp takes and warps that share a row's inputs, for `n_rows` rows of `k` inputs.
fn shape(n_rows: usize, k: usize, n_sms: usize) -> (usize, usize) {
    let units = k.div_ceil(1024);
    // Enough warps to fill the chip (32 per multiprocessor) before rows are shared by the lanes' loads.
    let rows = if n_rows >= 4 * 16 * n_sms { 4 } else { 2 };
    let mut split = 1;
    while split < WARPS && split < units && n_rows / rows * split < 32 * n_sms {
        split *= 2;
    }
    (rows, split)
}

/// The weights' side of the segments, and the types (-1: none).
fn segments(matrices: &[&Linear<DeviceWeight>]) -> ([Segment; 4], [i32; 4]) {
    let (mut segments, mut types) = ([NO_SEGMENT; 4], [-1; 4]);
    for (i, m) in matrices.iter().enumerate() {
        assert_eq!(m.weight.n_cols, matrices[0].weight.n_cols, "matrices of one launch share their input");
        types[i] = m.weight.ty as i32;
        segments[i].weight = m.weight.ptr;
        segments[i].scale = m.scale.map_or(Ptr::NULL, |w| w.ptr);
        segments[i].bias = m.bias.map_or(Ptr::NULL, |w| w.ptr);
        segments[i].n_blocks = m.weight.n_blocks() as u64;
        segments[i].n_rows = m.weight.n_rows as u32;
        segments[i].stride = m.weight.n_rows as u32;
    }
    (segments, types)
}

fn program(types: &[i32; 4], k: usize, tokens: usize, rows: usize, split: usize) -> Program {
    Program::new("gemv.cu", include_str!("gemv.cu"))
        .args::<GemvArgs>("GEMV_ARGS")
        .define("K", k)
        .define("TOKENS", tokens)
        .define("ROWS", rows)
        .define("KSPLIT", split)
        .define("WARPS", WARPS)
        .define("TYPE0", types[0])
        .define("TYPE1", types[1])
        .define("TYPE2", types[2])
        .define("TYPE3", types[3])
}

/// Matrices that share an input.
pub(crate) struct Gemv {
    segments: [Segment; 4],
    n_segments: usize,
    k: usize,
    /// Kernel for one token, and rows of a block.
    one: (Function, usize),
    /// The same for up to [`MANY`] tokens.
    many: (Function, usize),
}

impl Gemv {
    /// `matrices` `[n_out, k]`, at most four.
    pub fn new(linker: &mut Linker, matrices: &[&Linear<DeviceWeight>]) -> Result<Self, Error> {
        let (segments, types) = segments(matrices);
        let k = matrices[0].weight.n_cols;
        let n_rows: usize = matrices.iter().map(|m| m.weight.n_rows).sum();
        let (rows, split) = shape(n_rows, k, linker.n_sms);
        let one = linker.function(program(&types, k, 1, rows, split), "gemv", 0)?;
        let many = linker.function(program(&types, k, MANY, 2, split), "gemv", 0)?;
        let per_block = WARPS / split;
        Ok(Self { segments, n_segments: matrices.len(), k, one: (one, rows * per_block), many: (many, 2 * per_block) })
    }

    /// `outs[i]` `[n_tokens, n_rows of matrix i]` = (`add`: +=) product of matrix `i` with every token of `input`.
    pub fn launch(
        &self,
        device: &Device,
        input: &Input,
        outs: &[Ptr],
        n_tokens: usize,
        add: bool,
    ) -> Result<(), Error> {
        assert_eq!(outs.len(), self.n_segments);
        let (step, (function, rows_per_block)) = if n_tokens == 1 { (1, &self.one) } else { (MANY, &self.many) };
        for first in (0..n_tokens).step_by(step) {
            let mut args = GemvArgs {
                segment: self.segments,
                codes: input.codes.offset(first * self.k),
                heads: input.heads.offset(first * self.k / 32 * 8),
                x: input.x.offset(first * self.k * 4),
                codes_out: Ptr::NULL,
                heads_out: Ptr::NULL,
                n_tokens: step.min(n_tokens - first) as u32,
                pad: 0,
            };
            let mut blocks = 0;
            for (segment, out) in args.segment.iter_mut().zip(outs) {
                segment.out = out.offset(first * segment.n_rows as usize * 4);
                segment.first_block = blocks as u32;
                segment.add = u32::from(add);
                blocks += (segment.n_rows as usize).div_ceil(*rows_per_block);
            }
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows.
            unsafe { function.launch(device, Launch::new(blocks, WARPS * 32), &args)? };
        }
        Ok(())
    }
}

/// Gate and up with SwiGLU between them.
pub(crate) struct GemvSwiglu {
    segments: [Segment; 4],
    k: usize,
    n_rows: usize,
    one: Function,
    many: Function,
}

impl GemvSwiglu {
    /// `gate` and `up` `[n_ff, k]`.
    pub fn new(linker: &mut Linker, gate: &Linear<DeviceWeight>, up: &Linear<DeviceWeight>) -> Result<Self, Error> {
        let (segments, types) = segments(&[gate, up]);
        let k = gate.weight.n_cols;
        let one = linker.function(program(&types, k, 1, 4, 1), "gemv_swiglu", 0)?;
        let many = linker.function(program(&types, k, MANY, 2, 1), "gemv_swiglu", 0)?;
        Ok(Self { segments, k, n_rows: gate.weight.n_rows, one, many })
    }

    /// `out = silu(gate . input) * (up . input)` `[n_tokens, n_ff]`: as codes if `quantised`, else as floats.
    pub fn launch(
        &self,
        device: &Device,
        input: &Input,
        out: &Input,
        n_tokens: usize,
        quantised: bool,
    ) -> Result<(), Error> {
        assert!(!quantised || self.n_rows.is_multiple_of(32), "quantised rows are whole units");
        let (step, function) = if n_tokens == 1 { (1, &self.one) } else { (MANY, &self.many) };
        for first in (0..n_tokens).step_by(step) {
            let out_at = first * self.n_rows;
            let codes_or_null = |p: Ptr, bytes: usize| if quantised { p.offset(bytes) } else { Ptr::NULL };
            let mut args = GemvArgs {
                segment: self.segments,
                codes: input.codes.offset(first * self.k),
                heads: input.heads.offset(first * self.k / 32 * 8),
                x: input.x.offset(first * self.k * 4),
                codes_out: codes_or_null(out.codes, out_at),
                heads_out: codes_or_null(out.heads, out_at / 32 * 8),
                n_tokens: step.min(n_tokens - first) as u32,
                pad: 0,
            };
            args.segment[0].out = out.x.offset(out_at * 4);
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows.
            unsafe { function.launch(device, Launch::new(self.n_rows.div_ceil(32), 256), &args)? };
        }
        Ok(())
    }
}
