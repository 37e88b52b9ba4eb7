//! Products of weights with one token (`gemv.cu`): up to four matrices that share the input in one launch, or gate
//! and up with SwiGLU. Several tokens go to [`Few`], where weights are quantised. Refuses more than four matrices and,
//! for SwiGLU into a quantised product, widths that are not whole units of 32.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::device::Device;
use crate::error::Error;
use crate::few::Few;
use crate::ops::{DeviceWeight, Input, Linker, Step};
use tandem_spec::Linear;

/// Tokens of one launch of float matrices for several tokens.
const MANY: usize = 8;
/// Most warps that share the columns of a row.
const MAX_SPLIT: usize = 16;

/// A matrix of a launch.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub weight: Ptr,
    pub out: Ptr,
    pub scale: Ptr,
    pub bias: Ptr,
    pub n_blocks: u64,
    pub n_rows: u32,
    /// Of the grid.
    pub first_block: u32,
    pub add: u32,
    /// Which of a program's types, where these are not one a matrix.
    pub kind: u32,
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
    kind: 0,
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

/// The weights' side of the segments.
pub(crate) fn segments(matrices: &[&Linear<DeviceWeight>]) -> [Segment; 4] {
    let mut segments = [NO_SEGMENT; 4];
    for (segment, m) in segments.iter_mut().zip(matrices) {
        assert_eq!(m.weight.n_cols, matrices[0].weight.n_cols, "matrices of one launch share their input");
        segment.weight = m.weight.ptr;
        segment.scale = m.scale.map_or(Ptr::NULL, |w| w.ptr);
        segment.bias = m.bias.map_or(Ptr::NULL, |w| w.ptr);
        segment.n_blocks = m.weight.n_blocks() as u64;
        segment.n_rows = m.weight.n_rows as u32;
    }
    segments
}

fn program(matrices: &[&Linear<DeviceWeight>], tokens: usize, shape: Shape) -> Program {
    let mut program = Program::new("gemv.cu", include_str!("gemv.cu"))
        .args::<GemvArgs>("GEMV_ARGS")
        .define("K", matrices[0].weight.n_cols)
        .define("TOKENS", tokens)
        .define("ROWS", shape.rows)
        .define("KSPLIT", shape.split)
        .define("GROUPS", shape.groups);
    for (i, name) in ["TYPE0", "TYPE1", "TYPE2", "TYPE3"].into_iter().enumerate() {
        program = program.define(name, matrices.get(i).map_or(-1, |m| m.weight.ty as i32));
    }
    program
}

/// Matrices that share an input, for up to `tokens` tokens a launch.
struct Group {
    segments: [Segment; 4],
    /// Places of the matrices among those of the product.
    places: Vec<usize>,
    k: usize,
    tokens: usize,
    function: Function,
    shape: Shape,
}

impl Group {
    fn new(
        linker: &mut Linker,
        all: &[&Linear<DeviceWeight>],
        places: Vec<usize>,
        tokens: usize,
        max_rows: usize,
    ) -> Result<Self, Error> {
        let matrices: Vec<_> = places.iter().map(|i| all[*i]).collect();
        let k = matrices[0].weight.n_cols;
        let n_rows: usize = matrices.iter().map(|m| m.weight.n_rows).sum();
        let shape = Shape::new(n_rows, k, linker.n_sms, max_rows);
        let function = linker.function(program(&matrices, tokens, shape), "gemv", 0)?;
        Ok(Self { segments: segments(&matrices), places, k, tokens, function, shape })
    }

    fn launch(&self, device: &Device, input: &Input, outs: &[Ptr], n_tokens: usize, add: bool) -> Result<(), Error> {
        for first in (0..n_tokens).step_by(self.tokens) {
            let mut args = GemvArgs {
                segment: self.segments,
                codes: input.codes.offset(first * self.k),
                heads: input.heads.offset(first * self.k / 32 * 8),
                x: input.x.offset(first * self.k * 4),
                codes_out: Ptr::NULL,
                heads_out: Ptr::NULL,
                n_tokens: self.tokens.min(n_tokens - first) as u32,
                pad: 0,
            };
            let mut blocks = 0;
            for (segment, place) in args.segment.iter_mut().zip(&self.places) {
                segment.out = outs[*place].offset(first * segment.n_rows as usize * 4);
                segment.first_block = blocks as u32;
                segment.add = u32::from(add);
                blocks += (segment.n_rows as usize).div_ceil(self.shape.rows_per_block());
            }
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows.
            unsafe { self.function.launch_early(device, Launch::new(blocks, self.shape.threads()), &args)? };
        }
        Ok(())
    }
}

/// Matrices that share an input.
pub(crate) struct Gemv {
    n_matrices: usize,
    /// For one token.
    one: Group,
    /// For several: the quantised matrices and their places, and the others.
    few: Option<(Few, Vec<usize>)>,
    many: Option<Group>,
}

impl Gemv {
    /// `matrices` `[n_out, k]`, at most four.
    pub fn new(linker: &mut Linker, matrices: &[&Linear<DeviceWeight>]) -> Result<Self, Error> {
        let all = (0..matrices.len()).collect::<Vec<_>>();
        let (quantised, floats): (Vec<_>, Vec<_>) = all.iter().partition(|i| matrices[**i].weight.ty.is_quantised());
        let few = if quantised.is_empty() {
            None
        } else {
            let matrices: Vec<_> = quantised.iter().map(|i| matrices[*i]).collect();
            Some((Few::new(linker, &matrices)?, quantised))
        };
        let many = if floats.is_empty() { None } else { Some(Group::new(linker, matrices, floats, MANY, 2)?) };
        Ok(Self { n_matrices: matrices.len(), one: Group::new(linker, matrices, all, 1, 4)?, few, many })
    }

    /// `outs[i]` `[n_tokens, n_rows of matrix i]` = (`add`: +=) product of matrix `i` with every token of `input`.
    pub fn launch(&self, step: &Step, input: &Input, outs: &[Ptr], n_tokens: usize, add: bool) -> Result<(), Error> {
        assert_eq!(outs.len(), self.n_matrices);
        if n_tokens == 1 {
            return self.one.launch(step.device, input, outs, 1, add);
        }
        if let Some((few, places)) = &self.few {
            let outs: Vec<Ptr> = places.iter().map(|i| outs[*i]).collect();
            few.launch(step, input, &outs, n_tokens, add)?;
        }
        self.many.as_ref().map_or(Ok(()), |many| many.launch(step.device, input, outs, n_tokens, add))
    }
}

/// Gate and up with SwiGLU between them.
pub(crate) struct GemvSwiglu {
    segments: [Segment; 4],
    k: usize,
    n_rows: usize,
    /// For one token.
    one: (Function, Shape),
    several: Several,
}

/// SwiGLU for several tokens: on the tensor cores, or where a matrix is of floats, as for one.
enum Several {
    Few(Box<Few>),
    Many(Function, Shape),
}

impl GemvSwiglu {
    /// `gate` and `up` `[n_ff, k]`.
    pub fn new(linker: &mut Linker, gate: &Linear<DeviceWeight>, up: &Linear<DeviceWeight>) -> Result<Self, Error> {
        let (k, n_rows) = (gate.weight.n_cols, gate.weight.n_rows);
        let make = |linker: &mut Linker, tokens, max_rows| {
            let shape = Shape::of_units(n_rows, k, linker.n_sms, max_rows);
            Ok::<_, Error>((linker.function(program(&[gate, up], tokens, shape), "gemv_swiglu", 0)?, shape))
        };
        let one = make(linker, 1, 2)?;
        let several = if gate.weight.ty.is_quantised() && up.weight.ty.is_quantised() {
            Several::Few(Box::new(Few::pair(linker, gate, up)?))
        } else {
            let (function, shape) = make(linker, MANY, 1)?;
            Several::Many(function, shape)
        };
        Ok(Self { segments: segments(&[gate, up]), k, n_rows, one, several })
    }

    /// Whether several tokens go to the tensor cores; if not, their output is never 16-bit numbers.
    pub fn has_few(&self) -> bool {
        matches!(self.several, Several::Few(_))
    }

    /// `out = silu(gate . input) * (up . input)` `[n_tokens, n_ff]`: in the form that a quantised matrix takes if
    /// `quantised`, else as floats.
    pub fn launch(
        &self,
        step: &Step,
        input: &Input,
        out: &Input,
        n_tokens: usize,
        quantised: bool,
    ) -> Result<(), Error> {
        assert!(!quantised || self.n_rows.is_multiple_of(32), "quantised rows are whole units");
        let (tokens, function, shape) = match &self.several {
            _ if n_tokens == 1 => (1, &self.one.0, &self.one.1),
            Several::Few(few) => return few.launch_pair(step, input, out, n_tokens, quantised),
            Several::Many(function, shape) => (MANY, function, shape),
        };
        for first in (0..n_tokens).step_by(tokens) {
            let out_at = first * self.n_rows;
            let codes_or_null = |p: Ptr, bytes: usize| if quantised { p.offset(bytes) } else { Ptr::NULL };
            let mut args = GemvArgs {
                segment: self.segments,
                codes: input.codes.offset(first * self.k),
                heads: input.heads.offset(first * self.k / 32 * 8),
                x: input.x.offset(first * self.k * 4),
                codes_out: codes_or_null(out.codes, out_at),
                heads_out: codes_or_null(out.heads, out_at / 32 * 8),
                n_tokens: tokens.min(n_tokens - first) as u32,
                pad: 0,
            };
            args.segment[0].out = out.x.offset(out_at * 4);
            let launch = Launch::new(self.n_rows.div_ceil(32), shape.threads());
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows.
            unsafe { function.launch_early(step.device, launch, &args)? };
        }
        Ok(())
    }
}
