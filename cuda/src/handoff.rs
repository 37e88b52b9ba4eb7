//! Hand-overs between the GPU and CPU workers inside a step ([`Mailbox`]): the GPU writes activations to pinned
//! memory and raises a flag; the workers answer in the same memory; a kernel waits for the answer, within a bound, and
//! the step goes on. One hand-over is under way at a time, so one set of buffers serves all blocks. Refuses nothing and
//! computes nothing.

use crate::arena::{Pinned, Ptr};
use crate::compile::{Args, Function, Launch, Program};
use crate::device::Device;
use crate::error::Error;
use crate::ops::Linker;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem_spec::Block;

/// How long one side waits for the other, for each token of the batch, before the step fails.
const BOUND: Duration = Duration::from_secs(30);
/// Value of the workers' flag that ends a step.
const ABORTED: u32 = u32::MAX;
/// Hand-overs whose times are kept: as in handoff.cu.
const N_STAMPS: usize = 1024;
/// Times of a hand-over that the GPU keeps: as in handoff.cu.
const STAMPS: usize = 5;
const STAMP_BYTES: usize = N_STAMPS * STAMPS * size_of::<u64>();

#[repr(C)]
#[derive(Clone, Copy)]
struct GiveArgs {
    x: Ptr,
    to: Ptr,
    ids: Ptr,
    weights: Ptr,
    table: Ptr,
    ids_to: Ptr,
    weights_to: Ptr,
    count: Ptr,
    arrived: Ptr,
    failed: Ptr,
    ready: Ptr,
    stamps: Ptr,
    started: Ptr,
    n: u64,
    n_choices: u32,
    n_used: u32,
    stride: u32,
    pad: u32,
}
// SAFETY: mirrors GiveArgs in handoff.cu, which compares sizes.
unsafe impl Args for GiveArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct TakeArgs {
    x: Ptr,
    from: Ptr,
    count: Ptr,
    done: Ptr,
    fault: Ptr,
    failed: Ptr,
    stamps: Ptr,
    n: u64,
    bound_ns: u64,
    add: u32,
    pad: u32,
}
// SAFETY: mirrors TakeArgs in handoff.cu, which compares sizes.
unsafe impl Args for TakeArgs {}

fn program() -> Program {
    Program::new("handoff.cu", include_str!("handoff.cu")).args::<GiveArgs>("GIVE_ARGS").args::<TakeArgs>("TAKE_ARGS")
}

/// Experts that a mixture has chosen for a batch, on the device.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    /// `[n_tokens, n_used]`.
    pub ids: Ptr,
    /// `[n_tokens, stride]`, the first `n_used` of each.
    pub weights: Ptr,
    /// `[n_experts]` where the experts lie on this GPU, 0: nowhere.
    pub table: Ptr,
    /// `[n_experts]` i32: how often each was chosen; null where nobody counted.
    pub counts: Ptr,
    pub n_used: usize,
    pub stride: usize,
}

/// The kernels of hand-overs.
#[derive(Clone, Copy)]
pub(crate) struct Handover {
    give: Function,
    take: Function,
}

impl Handover {
    pub fn new(linker: &mut Linker) -> Result<Self, Error> {
        Ok(Self { give: linker.function(program(), "give", 0)?, take: linker.function(program(), "take", 0)? })
    }

    /// Gives `n` elements of `x` to the workers, and what a mixture has chosen. `started` is told the time where this
    /// begins a step, else null.
    pub fn give(
        &self,
        device: &Device,
        mailbox: &Mailbox,
        x: Ptr,
        n: usize,
        n_tokens: usize,
        chosen: Option<Chosen>,
        started: Ptr,
    ) -> Result<(), Error> {
        assert!(n <= mailbox.n, "{n} elements into a mailbox of {}", mailbox.n);
        let mut args = GiveArgs {
            x,
            to: mailbox.x(),
            ids: Ptr::NULL,
            weights: Ptr::NULL,
            table: Ptr::NULL,
            ids_to: mailbox.ids(),
            weights_to: mailbox.weights(),
            count: mailbox.counters,
            arrived: mailbox.counters.offset(4),
            failed: mailbox.counters.offset(8),
            ready: mailbox.flag(Flag::Ready),
            stamps: mailbox.stamps(),
            started,
            n: n as u64,
            n_choices: 0,
            n_used: 1,
            stride: 0,
            pad: 0,
        };
        if let Some(c) = chosen {
            assert!(n_tokens * c.n_used <= mailbox.n_choices, "choices of {n_tokens} tokens");
            (args.ids, args.weights, args.table) = (c.ids, c.weights, c.table);
            (args.n_choices, args.n_used, args.stride) =
                ((n_tokens * c.n_used) as u32, c.n_used as u32, c.stride as u32);
        }
        // SAFETY: the mailbox holds `n` elements and the choices; `count` and `arrived` are its counters.
        unsafe { self.give.launch_early(device, Launch::new(blocks(n), 256), &args) }
    }

    /// Waits for the workers' answer for `n_tokens`: adds it to the `n` elements of `x` where it is a share
    /// (`add`), or takes it as the residual stream.
    pub fn take(
        &self,
        device: &Device,
        mailbox: &Mailbox,
        x: Ptr,
        n: usize,
        n_tokens: usize,
        add: bool,
    ) -> Result<(), Error> {
        assert!(n <= mailbox.n, "{n} elements from a mailbox of {}", mailbox.n);
        let args = TakeArgs {
            x,
            from: if add { mailbox.sum() } else { mailbox.x() },
            count: mailbox.counters,
            done: mailbox.flag(Flag::Done),
            fault: mailbox.flag(Flag::Fault),
            failed: mailbox.counters.offset(8),
            stamps: mailbox.stamps(),
            n: n as u64,
            bound_ns: bound(n_tokens).as_nanos() as u64,
            add: u32::from(add),
            pad: 0,
        };
        // SAFETY: as in `give`.
        unsafe { self.take.launch_early(device, Launch::new(blocks(n), 256), &args) }
    }
}

fn bound(n_tokens: usize) -> Duration {
    BOUND * n_tokens as u32
}

/// One block hands over a token without counting blocks; more share the copy of a batch.
fn blocks(n: usize) -> usize {
    if n <= 16384 { 1.max(n.div_ceil(8192)) } else { n.div_ceil(4096).min(64) }
}

/// Flags, each in a cache line of its own.
#[derive(Clone, Copy)]
enum Flag {
    /// Hand-overs that the GPU has completed.
    Ready,
    /// Hand-overs that the workers have answered, or [`ABORTED`].
    Done,
    /// The GPU waited in vain.
    Fault,
    /// Number of a hand-over to come, and in the same cache line the experts that it will probably be about.
    Foreseen,
}

const FLAG_BYTES: usize = 4 * 128;
/// Experts beside the number of a hand-over in its cache line.
pub(crate) const FORESEEN: usize = 31;

/// Pinned memory that GPU and workers see, and the count of hand-overs on both sides.
pub struct Mailbox {
    memory: Pinned,
    /// Address of the memory on the GPU.
    base_ptr: Ptr,
    /// Elements of the residual stream of the largest batch.
    n: usize,
    n_choices: usize,
    /// On the device: hand-overs so far, blocks that have arrived, whether the step has failed.
    counters: Ptr,
    /// Hand-overs answered before the step at hand.
    base: AtomicU32,
    /// Nanoseconds, by hand-over: when the workers began to read ahead, when they waited for their input, when they saw
    /// it, and when they had answered.
    times: Box<[[AtomicU64; 4]]>,
    /// No more hand-overs will come in this step.
    is_abandoned: AtomicBool,
    /// When the workers began to read ahead for the next hand-over, as the times; 0: they have not.
    ahead_since: AtomicU64,
    epoch: Instant,
}

/// Elements of the residual stream, and chosen experts, that the blocks of a GPU hand over at most in a batch of
/// `n_batch` tokens of width `n_embd`. Both are whole cache lines.
pub(crate) fn mailbox_size<W>(blocks: &[Block<W>], n_embd: usize, n_batch: usize) -> (usize, usize) {
    let n_used = |block: &Block<W>| if let Block::Moe(b) = block { b.shape.n_used } else { 0 };
    let n_used = blocks.iter().map(n_used).max().unwrap_or(0);
    ((n_batch * n_embd).next_multiple_of(32), (n_batch * n_used).next_multiple_of(32))
}

/// Bytes of pinned memory of the [`Mailbox`] of a GPU that has `blocks`, for batches of `n_batch` tokens of width
/// `n_embd`.
pub fn mailbox_bytes<W>(blocks: &[Block<W>], n_embd: usize, n_batch: usize) -> usize {
    let (n, n_choices) = mailbox_size(blocks, n_embd, n_batch);
    FLAG_BYTES + STAMP_BYTES + (2 * n + 2 * n_choices) * 4
}

/// Bytes of device memory that the counters take.
pub(crate) const COUNTER_BYTES: usize = 12;

impl Mailbox {
    /// Memory for batches of `n` elements of the residual stream and `n_choices` chosen experts; `counters` is device
    /// memory of [`COUNTER_BYTES`], zero.
    ///
    /// # Errors
    /// No pinned memory.
    pub(crate) fn new(n: usize, n_choices: usize, counters: Ptr) -> Result<Self, Error> {
        let bytes = FLAG_BYTES + STAMP_BYTES + (2 * n + 2 * n_choices) * 4;
        let memory = Pinned::new(bytes)?;
        // SAFETY: just allocated.
        unsafe { memory.as_ptr::<u8>().write_bytes(0, bytes) };
        let base_ptr = memory.device_ptr()?;
        let times = (0..N_STAMPS).map(|_| Default::default()).collect();
        Ok(Self {
            memory,
            base_ptr,
            n,
            n_choices,
            counters,
            base: AtomicU32::new(0),
            times,
            is_abandoned: AtomicBool::new(false),
            ahead_since: AtomicU64::new(0),
            epoch: Instant::now(),
        })
    }

    /// Address on the host of a GPU address within.
    fn host<T>(&self, ptr: Ptr) -> *mut T {
        let offset = (ptr.0 - self.base_ptr.0) as usize;
        assert!(offset < self.memory.bytes());
        // SAFETY: within the allocation.
        unsafe { self.memory.as_ptr::<u8>().add(offset) }.cast()
    }

    fn at(&self, offset: usize) -> Ptr {
        self.base_ptr.offset(offset)
    }

    fn flag(&self, flag: Flag) -> Ptr {
        self.at(flag as usize * 128)
    }

    fn stamps(&self) -> Ptr {
        self.at(FLAG_BYTES)
    }

    fn x(&self) -> Ptr {
        self.at(FLAG_BYTES + STAMP_BYTES)
    }

    fn sum(&self) -> Ptr {
        self.x().offset(4 * self.n)
    }

    fn ids(&self) -> Ptr {
        self.sum().offset(4 * self.n)
    }

    fn weights(&self) -> Ptr {
        self.ids().offset(4 * self.n_choices)
    }

    fn atomic(&self, flag: Flag) -> &AtomicU32 {
        // SAFETY: aligned, within the allocation, never accessed but atomically.
        unsafe { &*self.host::<AtomicU32>(self.flag(flag)) }
    }

    /// Bytes of pinned memory.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The workers' view: residual stream and sum (elements of each), ids and weights (elements of each).
    pub fn memory(&self) -> (*mut f32, *mut f32, usize, *const u32, *const f32, usize) {
        let at = |offset: usize| self.memory.as_ptr::<u8>().wrapping_add(FLAG_BYTES + STAMP_BYTES + offset);
        let choices = 8 * self.n;
        let weights = choices + 4 * self.n_choices;
        (at(0).cast(), at(4 * self.n).cast(), self.n, at(choices).cast(), at(weights).cast(), self.n_choices)
    }

    /// Number of the hand-over before the first one of the step at hand: to be asked before the step may end.
    pub fn begin(&self) -> u32 {
        self.base.load(Ordering::Acquire)
    }

    /// Waits until hand-over `i` of the step of `n_tokens` that began at `base` is complete; `false` where it does not
    /// come: `is_alive` says now and then whether the GPU still works.
    pub fn wait(&self, base: u32, i: usize, n_tokens: usize, is_alive: &dyn Fn() -> bool) -> bool {
        let wanted = base.wrapping_add(i as u32 + 1);
        let (ahead, asked) = (self.ahead_since.swap(0, Ordering::Relaxed), self.now());
        self.stamp(wanted, 0, if ahead > 0 { ahead } else { asked });
        self.stamp(wanted, 1, asked);
        let (start, mut spins) = (Instant::now(), 0u32);
        while !self.is_ready(base, i) {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 16) {
                let failed = self.is_abandoned.load(Ordering::Acquire)
                    || self.atomic(Flag::Fault).load(Ordering::Acquire) != 0
                    || start.elapsed() > bound(n_tokens)
                    || !is_alive();
                if failed {
                    return false;
                }
                std::thread::yield_now();
            }
        }
        self.stamp(wanted, 2, self.now());
        true
    }

    /// Whether hand-over `i` of the step that began at `base` is complete.
    pub fn is_ready(&self, base: u32, i: usize) -> bool {
        self.atomic(Flag::Ready).load(Ordering::Acquire).wrapping_sub(base.wrapping_add(i as u32 + 1)) as i32 >= 0
    }

    /// The expert number `nth` of those that hand-over `i` of the step that began at `base` will probably be about, the
    /// likeliest first, marked as those that are handed over; `None` where the GPU has not said. A worker that asks
    /// when the hand-over is long complete may get one of the next.
    pub fn foreseen(&self, base: u32, i: usize, nth: usize) -> Option<u32> {
        let line: *const AtomicU32 = self.host(self.flag(Flag::Foreseen));
        // SAFETY: the line lies within the allocation and is never accessed but atomically.
        let line = unsafe { std::slice::from_raw_parts(line, 1 + FORESEEN) };
        let is_of_it = line[0].load(Ordering::Acquire) == base.wrapping_add(i as u32 + 1);
        line.get(1 + nth).filter(|_| is_of_it).map(|id| id.load(Ordering::Relaxed))
    }

    /// Says that the workers begin to read ahead for the next hand-over.
    pub fn reads_ahead(&self) {
        self.ahead_since.store(self.now(), Ordering::Relaxed);
    }

    /// Where the GPU says what it foresees.
    pub(crate) fn foreseen_ptr(&self) -> Ptr {
        self.flag(Flag::Foreseen)
    }

    /// Hand-overs so far, on the device.
    pub(crate) fn count_ptr(&self) -> Ptr {
        self.counters
    }

    /// Says that hand-over `i` of the step that began at `base` is answered.
    pub fn post(&self, base: u32, i: usize) {
        let number = base.wrapping_add(i as u32 + 1);
        self.stamp(number, 3, self.now());
        self.atomic(Flag::Done).store(number, Ordering::Release);
    }

    fn stamp(&self, number: u32, what: usize, time: u64) {
        self.times[number as usize % N_STAMPS][what].store(time, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// Ends the step at hand: neither side waits any longer.
    pub fn abort(&self) {
        self.is_abandoned.store(true, Ordering::Release);
        self.atomic(Flag::Done).store(ABORTED, Ordering::Release);
    }

    /// After a step of `n` hand-overs, the stream being idle: whether the GPU gave them all and waited for no answer in
    /// vain. If not, both sides begin anew; the caller clears the counters.
    pub(crate) fn finish(&self, n: usize) -> bool {
        let base = self.base.load(Ordering::Relaxed).wrapping_add(n as u32);
        let is_good = !self.is_abandoned.load(Ordering::Acquire)
            && self.atomic(Flag::Fault).load(Ordering::Acquire) == 0
            && self.atomic(Flag::Ready).load(Ordering::Acquire) == base;
        if is_good {
            self.base.store(base, Ordering::Relaxed);
            return true;
        }
        for flag in [Flag::Ready, Flag::Done, Flag::Fault, Flag::Foreseen] {
            self.atomic(flag).store(0, Ordering::Release);
        }
        self.base.store(0, Ordering::Relaxed);
        self.is_abandoned.store(false, Ordering::Release);
        false
    }

    /// The times of the last `n` hand-overs, at most 1024. What has no answer on the GPU keeps old times of its wait.
    pub fn times(&self, n: usize) -> Vec<Times> {
        let base = self.base.load(Ordering::Relaxed);
        (0..n.min(N_STAMPS) as u32)
            .map(|i| {
                let at = base.wrapping_sub(n as u32).wrapping_add(i + 1) as usize % N_STAMPS;
                // SAFETY: within the stamps, which the GPU has written before the stream was idle.
                let gpu = |i: usize| unsafe { self.host::<u64>(self.stamps()).add(STAMPS * at + i).read_volatile() };
                let cpu = |what: usize| self.times[at][what].load(Ordering::Relaxed);
                Times {
                    begun: gpu(0),
                    given: gpu(1),
                    waits: gpu(2),
                    goes_on: gpu(3),
                    taken: gpu(4),
                    ahead: cpu(0),
                    asked: cpu(1),
                    seen: cpu(2),
                    answered: cpu(3),
                }
            })
            .collect()
    }
}

/// Times of a hand-over, nanoseconds: two clocks, which begin at different moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// GPU: what is handed over is complete.
    pub begun: u64,
    /// GPU: the workers may have it.
    pub given: u64,
    /// GPU: nothing is left to do without the answer.
    pub waits: u64,
    /// GPU: the answer is there.
    pub goes_on: u64,
    /// GPU: it is in the residual stream.
    pub taken: u64,
    /// CPU: the workers begin to read ahead; as `asked` where they did not.
    pub ahead: u64,
    /// CPU: they wait for the input.
    pub asked: u64,
    /// CPU: the workers have the input.
    pub seen: u64,
    /// CPU: they have answered.
    pub answered: u64,
}
