//! `Moe` on the GPU, `moe.cu`: norm, router and choice; gate and up of all chosen experts and the shared one; their
//! weighted sum onto the residual stream. Routed experts are found through a table of addresses; those that are
//! not on this GPU add nothing. Refuses more than 31 experts per token.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::handoff::{Chosen, FORESEEN, Mailbox};
use crate::layout::ExpertSlot;
use crate::ops::{DeviceWeight, Linker, Step};
use tandem_spec::{Linear, Moe};

#[repr(C)]
#[derive(Clone, Copy)]
struct Expert {
    weight: Ptr,
    scale: Ptr,
    n_blocks: u64,
}

impl Expert {
    const NONE: Expert = Expert { weight: Ptr::NULL, scale: Ptr::NULL, n_blocks: 0 };

    fn new(l: &Linear<DeviceWeight>) -> Self {
        let scale = l.scale.map_or(Ptr::NULL, |w| w.ptr);
        Self { weight: l.weight.ptr, scale, n_blocks: l.weight.n_blocks() as u64 }
    }
}

/// Gate, up and down of one routed expert: addresses of weights count from the expert's slot, and the scales begin
/// with that of expert 0, which need not be there.
pub(crate) fn routed(b: &Moe<DeviceWeight>) -> [Linear<DeviceWeight>; 3] {
    let slot = ExpertSlot::new(b, |w| w.ty);
    let linears = b.stacks();
    let (n_embd, n_ff, before) = (b.shape.n_embd, b.shape.n_ff, 4 * b.experts.start as u64);
    let n_rows = [n_ff, n_ff, n_embd];
    std::array::from_fn(|i| {
        let Linear { weight, scale, bias } = linears[i];
        Linear {
            weight: DeviceWeight { ptr: Ptr(slot.parts[i].offset as u64), n_rows: n_rows[i], ..*weight },
            scale: scale.map(|s| DeviceWeight { ptr: Ptr(s.ptr.0.wrapping_sub(before)), ..s }),
            bias: *bias,
        }
    })
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MoeArgs {
    norm: Ptr,
    begun: Ptr,
    h: Ptr,
    codes: Ptr,
    heads: Ptr,
    router: Ptr,
    gate_shared: Ptr,
    table: Ptr,
    experts: [Expert; 6],
    logits: Ptr,
    done: Ptr,
    ids: Ptr,
    slots: Ptr,
    weights: Ptr,
    units: Ptr,
    act: Ptr,
    act_codes: Ptr,
    act_heads: Ptr,
    x: Ptr,
    eps: f32,
    block: u32,
}
// SAFETY: mirrors MoeArgs in moe.cu, which compares sizes.
unsafe impl Args for MoeArgs {}

/// Experts of a token: one for each lane of a warp but the shared expert's.
const MAX_USED: usize = 31;
const _: () = assert!(MAX_USED <= FORESEEN);

#[repr(C)]
#[derive(Clone, Copy)]
struct ForeseeArgs {
    moe: MoeArgs,
    foreseen: Ptr,
    count: Ptr,
}
// SAFETY: mirrors ForeseeArgs in moe.cu, which compares sizes.
unsafe impl Args for ForeseeArgs {}

/// Outputs of a block of `moe_gate_up`: two rows per group of warps that share the columns, as KSPLIT in moe.cu.
fn outputs_per_block(n_embd: usize) -> usize {
    match n_embd {
        4096.. => 2,
        2048.. => 4,
        _ => 8,
    }
}

/// A block with its kernels.
pub(crate) struct MoeOp {
    block: Moe<DeviceWeight>,
    /// `[n_experts]` u64: addresses of slots.
    table: Ptr,
    /// Which forms of the norm the experts take.
    floats: bool,
    codes: bool,
    route: Function,
    foresee: Function,
    gate_up: Function,
    down: Function,
}

impl MoeOp {
    /// `table` `[n_experts]` u64: where the slots of the routed experts are, 0: not here.
    pub fn new(linker: &mut Linker, block: Moe<DeviceWeight>, table: Ptr) -> Result<Self, Error> {
        let s = &block.shape;
        if s.n_used > MAX_USED {
            let reason = format!("{} experts per token: the GPU kernels take at most {MAX_USED}", s.n_used);
            return Err(Error::Unsupported(reason));
        }
        let routed = block.stacks();
        let shared = block.shared.as_ref().map(|e| [&e.ffn_gate_shexp, &e.ffn_up_shexp, &e.ffn_down_shexp]);
        let mut program = Program::new("moe.cu", include_str!("moe.cu"))
            .args::<MoeArgs>("MOE_ARGS")
            .args::<ForeseeArgs>("FORESEE_ARGS")
            .define("N", s.n_embd)
            .define("N_EXPERTS", s.n_experts)
            .define("N_USED", s.n_used)
            .define("N_FF", s.n_ff)
            .define("N_FF_SHARED", if shared.is_some() { s.n_ff_shared } else { 0 });
        for (name, l) in ["TYPE_GATE", "TYPE_UP", "TYPE_DOWN"].into_iter().zip(routed) {
            program = program.define(name, l.weight.ty as u32);
        }
        for (name, l) in ["TYPE_GATE_S", "TYPE_UP_S", "TYPE_DOWN_S"].into_iter().zip(shared.unwrap_or(routed)) {
            program = program.define(name, l.weight.ty as u32);
        }
        let mut users = vec![&block.ffn_gate_exps, &block.ffn_up_exps];
        users.extend(shared.iter().flat_map(|s| &s[..2]));
        Ok(Self {
            floats: !users.iter().all(|l| l.weight.ty.is_quantised()),
            codes: users.iter().any(|l| l.weight.ty.is_quantised()),
            route: linker.function(program.clone(), "moe_route", 0)?,
            foresee: linker.function(program.clone(), "moe_foresee", 0)?,
            gate_up: linker.function(program.clone(), "moe_gate_up", 0)?,
            down: linker.function(program, "moe_down", 0)?,
            block,
            table,
        })
    }

    /// Queues the norm, the router and the choice of experts.
    pub fn choose(&self, step: &Step) -> Result<(), Error> {
        let launch = Launch::grid(self.route_blocks() + 1, step.n_tokens, 1, 128);
        // SAFETY: buffers hold the rows; the counters start as zero; the kernel waits for its inputs.
        unsafe { self.route.launch_early(step.device, launch, &self.args(step)) }
    }

    /// Queues a guess, for the workers behind `mailbox`, of the experts that this block will choose when the residual
    /// stream of the one token at hand has come to it: the hand-over after those so far.
    pub fn foresee(&self, step: &Step, mailbox: &Mailbox) -> Result<(), Error> {
        let (foreseen, count) = (mailbox.foreseen_ptr(), mailbox.count_ptr());
        let args = ForeseeArgs { moe: self.args(step), foreseen, count };
        // SAFETY: as in `choose`, whose logits and counters are free; a mailbox has room for the experts.
        unsafe { self.foresee.launch_early(step.device, Launch::new(self.route_blocks(), 128), &args) }
    }

    /// Blocks that have a part in the choice of a token: ROUTE_BLOCKS in moe.cu.
    fn route_blocks(&self) -> usize {
        (self.block.shape.n_experts + 1).div_ceil(2)
    }

    /// What [`MoeOp::choose`] leaves behind.
    pub fn chosen(&self, step: &Step) -> Chosen {
        let (n_used, table) = (self.block.shape.n_used, self.table);
        Chosen { ids: step.routed[2], weights: step.routed[3], table, counts: Ptr::NULL, n_used, stride: n_used + 1 }
    }

    fn args(&self, step: &Step) -> MoeArgs {
        let b = &self.block;
        let shared = b.shared.as_ref();
        let of_shared = |f: fn(&tandem_spec::SharedExpert<DeviceWeight>) -> &Linear<DeviceWeight>| {
            shared.map_or(Expert::NONE, |e| Expert::new(f(e)))
        };
        let [gate, up, down] = &routed(b);
        let only = |wanted: bool, p: Ptr| if wanted { p } else { Ptr::NULL };
        MoeArgs {
            norm: b.ffn_norm.ptr,
            begun: step.begun,
            h: only(self.floats, step.hidden.x),
            codes: only(self.codes, step.hidden.codes),
            heads: step.hidden.heads,
            router: b.ffn_gate_inp.ptr,
            gate_shared: shared.and_then(|e| e.ffn_gate_inp_shexp).map_or(Ptr::NULL, |w| w.ptr),
            table: self.table,
            experts: [
                Expert::new(gate),
                Expert::new(up),
                Expert::new(down),
                of_shared(|e| &e.ffn_gate_shexp),
                of_shared(|e| &e.ffn_up_shexp),
                of_shared(|e| &e.ffn_down_shexp),
            ],
            logits: step.routed[0],
            done: step.routed[1],
            ids: step.routed[2],
            slots: step.routed[4],
            weights: step.routed[3],
            units: step.done,
            act: step.mixed.x,
            act_codes: step.mixed.codes,
            act_heads: step.mixed.heads,
            x: step.x,
            eps: b.shape.rms_eps,
            block: step.block as u32,
        }
    }

    /// Queues the chosen experts that are here, and the shared one.
    pub fn add(&self, step: &Step) -> Result<(), Error> {
        let (s, device, n) = (&self.block.shape, step.device, step.n_tokens);
        let (args, shared) = (self.args(step), self.block.shared.as_ref());
        let n_shared = usize::from(shared.is_some());
        let width = if shared.is_some() { s.n_ff.max(s.n_ff_shared) } else { s.n_ff };
        // SAFETY: buffers hold `n` rows; ids lie below `n_experts` whatever the logits are; the counters start
        // as zero; both kernels wait for their inputs.
        unsafe {
            let blocks = width.next_multiple_of(32) / outputs_per_block(s.n_embd);
            self.gate_up.launch_early(device, Launch::grid(blocks, s.n_used + n_shared, n, 128), &args)?;
            self.down.launch_early(device, Launch::grid(s.n_embd.div_ceil(2), n, 1, 128), &args)
        }
    }
}
