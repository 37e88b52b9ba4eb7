//! Products of quantised weights with a few tokens on the tensor cores (`few.cu`): up to four matrices that share the
//! input in one launch, or gate and up with SwiGLU. Owns how the work is shared among blocks and the memory that takes.
//! Refuses float weights.
//!
//! Accuracy: activations and weights are rounded to bf16 (weights of codes up to 6 bits to within 1.5 times that),
//! relative rms about 2e-3 per product; to f16 on chips without bf16.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::gemv::{Segment, segments};
use crate::ops::{DeviceWeight, Input, Linker, Step};
use tandem_spec::{Block, Linear, TensorType, Weight};

/// Most tokens of a launch, by variant.
const TOKENS: [usize; 3] = [8, 16, 32];
/// Rows of a tile.
const ROWS: usize = 128;
const THREADS: usize = 256;
/// Columns of a step.
const STEP: usize = 256;
/// Blocks that a multiprocessor holds at a time.
const BLOCKS: usize = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct FewArgs {
    segment: [Segment; 4],
    x: Ptr,
    halves_out: Ptr,
    sums: Ptr,
    done: Ptr,
    n_tokens: u32,
    n_units: u32,
    n_tiles: u32,
    share: u32,
}
// SAFETY: mirrors FewArgs in few.cu, which compares sizes.
unsafe impl Args for FewArgs {}

/// Bytes of the sums of blocks that share tiles, and of the counters of finished steps of `blocks`' tiles, for batches
/// of up to `n_batch` tokens on a GPU of `n_sms` multiprocessors.
pub(crate) fn sum_bytes(blocks: &[Block<Weight>], n_batch: usize, n_sms: usize) -> [usize; 2] {
    if n_batch < 2 {
        return [0, 0];
    }
    let most = TOKENS[TOKENS.len() - 1];
    let tokens = TOKENS.into_iter().find(|t| *t >= n_batch).unwrap_or(most);
    // No product has more tiles than all matrices of a block together.
    let tiles = |block: &Block<Weight>| {
        let mut n = 0;
        block.for_each(&mut |w| n += w.n_rows().div_ceil(ROWS / 2));
        n
    };
    let n_tiles = blocks.iter().filter(|b| !matches!(b, Block::Embed(_) | Block::Moe(_))).map(tiles).max().unwrap_or(0);
    [BLOCKS * n_sms * 2 * ROWS * tokens * 4, n_tiles * 4]
}

/// Products with the same input.
pub(crate) struct Few {
    segments: [Segment; 4],
    n_segments: usize,
    k: usize,
    n_tiles: usize,
    /// Steps of a block, and blocks.
    share: (usize, usize),
    /// By [`TOKENS`].
    functions: [Function; 3],
    /// Rows of gate and up, where these are multiplied and quantised in one go.
    pair: Option<usize>,
}

impl Few {
    /// `matrices` `[n_out, k]`, quantised, at most four.
    pub fn new(linker: &mut Linker, matrices: &[&Linear<DeviceWeight>]) -> Result<Self, Error> {
        Self::of(linker, matrices, None)
    }

    /// `gate` and `up` `[n_ff, k]`, quantised.
    pub fn pair(linker: &mut Linker, gate: &Linear<DeviceWeight>, up: &Linear<DeviceWeight>) -> Result<Self, Error> {
        Self::of(linker, &[gate, up], Some(gate.weight.n_rows))
    }

    fn of(linker: &mut Linker, matrices: &[&Linear<DeviceWeight>], pair: Option<usize>) -> Result<Self, Error> {
        let (mut segments, k) = (segments(matrices), matrices[0].weight.n_cols);
        let mut types: Vec<TensorType> = matrices.iter().map(|m| m.weight.ty).collect();
        // Which matrix has which type is told by its segment, so that few programs serve all.
        types.sort_by_key(|ty| *ty as u32);
        types.dedup();
        let mut n_tiles = 0;
        for (segment, m) in segments.iter_mut().zip(matrices) {
            assert!(m.weight.ty.is_quantised() && k.is_multiple_of(32), "float weights take another way");
            assert!(u32::try_from(m.weight.n_rows * k / 32).is_ok(), "units are counted in 32 bits");
            segment.first_block = n_tiles as u32;
            segment.kind = types.iter().position(|ty| *ty == m.weight.ty).expect("collected above") as u32;
            n_tiles += m.weight.n_rows.div_ceil(ROWS);
        }
        let n_tiles = pair.map_or(n_tiles, |n_rows| n_rows.div_ceil(ROWS / 2));
        let mut function = |tokens| {
            let mut program = Program::new("few.cu", include_str!("few.cu"))
                .args::<FewArgs>("FEW_ARGS")
                .define("TOKENS", tokens)
                .define("PAIR", u8::from(pair.is_some()));
            for (i, name) in ["TYPE0", "TYPE1", "TYPE2", "TYPE3"].into_iter().enumerate() {
                program = program.define(name, types.get(i).map_or(-1, |ty| *ty as i32));
            }
            linker.function(program, if pair.is_some() { "few_swiglu" } else { "few" }, 0)
        };
        let functions = [function(TOKENS[0])?, function(TOKENS[1])?, function(TOKENS[2])?];
        let n_steps = n_tiles * k.div_ceil(STEP);
        // A share of a block without rows, all of which are streamed, is never launched.
        let share = n_steps.div_ceil(BLOCKS * linker.n_sms).max(1);
        let share = (share, n_steps.div_ceil(share));
        Ok(Self { segments, n_segments: matrices.len(), k, n_tiles, share, functions, pair })
    }

    /// `outs[i]` `[n_tokens, n_rows of matrix i]` = (`add`: +=) product of matrix `i` with every token of `input`.
    pub fn launch(&self, step: &Step, input: &Input, outs: &[Ptr], n_tokens: usize, add: bool) -> Result<(), Error> {
        assert!(outs.len() == self.n_segments && self.pair.is_none());
        self.launch_groups(step, input, n_tokens, |args, first| {
            for (segment, out) in args.segment.iter_mut().zip(outs) {
                segment.out = out.offset(first * segment.n_rows as usize * 4);
                segment.add = u32::from(add);
            }
        })
    }

    /// `out = silu(gate . input) * (up . input)` `[n_tokens, n_ff]`: as 16-bit numbers if `halves`, else as
    /// floats.
    pub fn launch_pair(
        &self,
        step: &Step,
        input: &Input,
        out: &Input,
        n_tokens: usize,
        halves: bool,
    ) -> Result<(), Error> {
        let n_rows = self.pair.expect("made of gate and up");
        self.launch_groups(step, input, n_tokens, |args, first| {
            let at = first * n_rows;
            args.segment[0].out = out.x.offset(at * 4);
            if halves {
                args.halves_out = out.halves.offset(at * 2);
            }
        })
    }

    /// One launch for each group of tokens; `place` puts the output of the group that starts at a token.
    fn launch_groups(
        &self,
        step: &Step,
        input: &Input,
        n_tokens: usize,
        place: impl Fn(&mut FewArgs, usize),
    ) -> Result<(), Error> {
        let most = TOKENS[TOKENS.len() - 1];
        for first in (0..n_tokens).step_by(most) {
            let n = most.min(n_tokens - first);
            let variant = TOKENS.iter().position(|t| *t >= n).expect("a group is no larger than the largest");
            let mut args = FewArgs {
                segment: self.segments,
                x: input.halves.offset(first * self.k * 2),
                halves_out: Ptr::NULL,
                sums: step.sums[0],
                done: step.sums[1],
                n_tokens: n as u32,
                n_units: (self.k / 32) as u32,
                n_tiles: self.n_tiles as u32,
                share: self.share.0 as u32,
            };
            place(&mut args, first);
            // SAFETY: the weights are whole tensors of the stated types; inputs and outputs hold `n_tokens` rows;
            // `sums` holds those of BLOCKS per multiprocessor; the counters start as zero and are left so.
            unsafe { self.functions[variant].launch_early(step.device, Launch::new(self.share.1, THREADS), &args)? };
        }
        Ok(())
    }
}
