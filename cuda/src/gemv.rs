//! Products of weights with one token or a few (`gemv.cu`): up to four matrices that share the input in one launch,
//! or gate and up with SwiGLU. Refuses more than four matrices and, for SwiGLU into a quantised product, widths
//! that are not whole units of 32.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::device::Device;
use crate::error::Error;
use crate::ops::{DeviceWeight, Input, Linker};
use tandem_spec::Linear;

/// Tokens of one launch of the wide variant.
const MANY: usize = 8;
/// Most warps that share the columns of a row.
const MAX_SPLIT: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    weight: Ptr,
    out: Ptr,
    scale: Ptr,
    bias: Ptr,
    n_blocks: u64,
    n_rows: u32,
    first_block: u32,
    add: u32,
    pad: u32,
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
    first_block: u32::MAX,
    add: 0,
    pad: 0,
};

/// How a grid covers a matrix.
#[derive(Clone, Copy)]
struct Shape {
    /// Rows of a warp.
    rows: usize,
    /// Warps that share the columns.
    split: usize,
    /// Row groups of a block.
    groups: usize,
}

impl Shape {
    /// For `n_rows` rows of `k` columns, with at most `max_rows` rows a warp: one round of loads for every warp (a
    /// round is 1024 columns), and 16 warps per multiprocessor before a warp takes more rows.
    fn new(n_rows: usize, k: usize, n_sms: usize, max_rows: usize) -> Self {
        let rounds = k.div_ceil(1024).max(1);
        let split = rounds.div_ceil(rounds.div_ceil(MAX_SPLIT));
        let mut rows = max_rows;
        while rows > 1 && n_rows / rows * split < 16 * n_sms {
            rows /= 2;
        }
        Self {
            rows,
            split,
            groups: if split >= 4 {
                1
            } else if split >= 2 {
                2
            } else {
                4
            },
        }
    }

    /// For blocks that make 32 outputs each, of `n_rows`, from `rows` rows of two matrices at a time: as many groups as
    /// fill the chip with 16 warps per multiprocessor, if 16 warps of a block can.
    fn of_units(n_rows: usize, k: usize, n_sms: usize, rows: usize) -> Self {
        let Self { split, .. } = Self::new(n_rows, k, n_sms, rows);
        let mut groups = 1;
        while 2 * groups * split <= 16 && 2 * groups * rows <= 32 && n_rows / 32 * split * groups < 16 * n_sms {
            groups *= 2;
        }
        Self { rows, split, groups }
    }

    /// Rows of a block.
    fn rows_per_block(&self) -> usize {
        self.rows * self.groups
    }

    fn threads(&self) -> usize {
        self.split * self.groups * 32
    }
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
    }
    (segments, types)
}

fn program(types: &[i32; 4], k: usize, tokens: usize, shape: Shape) -> Program {
    Program::new("gemv.cu", include_str!("gemv.cu"))
        .args::<GemvArgs>("GEMV_ARGS")
        .define("K", k)
        .define("TOKENS", tokens)
        .define("ROWS", shape.rows)
        .define("KSPLIT", shape.split)
        .define("GROUPS", shape.groups)
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
    /// For one token.
    one: (Function, Shape),
    /// For up to [`MANY`] tokens.
    many: (Function, Shape),
}

impl Gemv {
    /// `matrices` `[n_out, k]`, at most four.
    pub fn new(linker: &mut Linker, matrices: &[&Linear<DeviceWeight>]) -> Result<Self, Error> {
        let (segments, types) = segments(matrices);
        let k = matrices[0].weight.n_cols;
        let n_rows: usize = matrices.iter().map(|m| m.weight.n_rows).sum();
        let make = |linker: &mut Linker, tokens, max_rows| {
            let shape = Shape::new(n_rows, k, linker.n_sms, max_rows);
            Ok::<_, Error>((linker.function(program(&types, k, tokens, shape), "gemv", 0)?, shape))
        };
        let (one, many) = (make(linker, 1, 4)?, make(linker, MANY, 2)?);
        Ok(Self { segments, n_segments: matrices.len(), k, one, many })
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
        let (step, (function, shape)) = if n_tokens == 1 { (1, &self.one) } else { (MANY, &self.many) };
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
                blocks += (segment.n_rows as usize).div_ceil(shape.rows_per_block());
            }
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows.
            unsafe { function.launch_early(device, Launch::new(blocks, shape.threads()), &args)? };
        }
        Ok(())
    }
}

/// Gate and up with SwiGLU between them.
pub(crate) struct GemvSwiglu {
    segments: [Segment; 4],
    k: usize,
    n_rows: usize,
    one: (Function, Shape),
    many: (Function, Shape),
}

impl GemvSwiglu {
    /// `gate` and `up` `[n_ff, k]`.
    pub fn new(linker: &mut Linker, gate: &Linear<DeviceWeight>, up: &Linear<DeviceWeight>) -> Result<Self, Error> {
        let (segments, types) = segments(&[gate, up]);
        let (k, n_rows) = (gate.weight.n_cols, gate.weight.n_rows);
        let make = |linker: &mut Linker, tokens, max_rows| {
            let shape = Shape::of_units(n_rows, k, linker.n_sms, max_rows);
            Ok::<_, Error>((linker.function(program(&types, k, tokens, shape), "gemv_swiglu", 0)?, shape))
        };
        let (one, many) = (make(linker, 1, 2)?, make(linker, MANY, 1)?);
        Ok(Self { segments, k, n_rows, one, many })
    }

    /// `out = silu(gate . input) * (up . input)` `[n_tokens, n_ff]`: as codes if `quantised`, else as
    /// floats.
    pub fn launch(
        &self,
        device: &Device,
        input: &Input,
        out: &Input,
        n_tokens: usize,
        quantised: bool,
    ) -> Result<(), Error> {
        assert!(!quantised || self.n_rows.is_multiple_of(32), "quantised rows are whole units");
        let (step, (function, shape)) = if n_tokens == 1 { (1, &self.one) } else { (MANY, &self.many) };
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
            unsafe { function.launch_early(device, Launch::new(self.n_rows.div_ceil(32), shape.threads()), &args)? };
        }
        Ok(())
    }
}
