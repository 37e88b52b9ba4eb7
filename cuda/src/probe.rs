//! What a GPU does, measured in a fraction of a second: reading its memory, 16-bit products, copies from and to the
//! host, kernels of a replayed graph, hand-offs to a polling thread, and the memory that the driver takes beside ours.
//! Every figure is the best of a few passes: whatever else runs only slows one down. Knows no model.

use crate::arena::{Arena, Pinned, Ptr, Range};
use crate::backend::Graph;
use crate::compile::{Args, Compiler, Kernels, Launch, Program};
use crate::dense::{self, Dense};
use crate::device::Device;
use crate::error::{During, Error};
use crate::prompt::Products;
use cudarc::driver::{result, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Bytes that are read and multiplied: several times the largest L2.
const DATA_BYTES: usize = 1 << 30;
/// Bytes of a copy.
const COPY_BYTES: usize = 64 << 20;
/// Passes per figure.
const PASSES: usize = 4;
/// Activations of a hand-off: a token of a model of 5120.
const HANDOFF_FLOATS: usize = 5120;
const HANDOFF_ROUNDS: usize = 200;
/// Bytes between the two flags of a hand-off and the activations.
const LINE: usize = 256;
/// Kernels of the longer of two graphs, whose difference is measured.
const GRAPH_KERNELS: usize = 512;

/// What was measured. GB/s are 10^9 bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Reading device memory, GB/s.
    pub read_gb_per_s: f64,
    /// 16-bit products with f32 sums through `mma.sync`, 10^12 operations per second (two per multiply-add).
    pub mma_tflops: f64,
    /// The same through cuBLASLt, where the prompt kernels use it and it is there.
    pub dense_tflops: Option<f64>,
    /// Host to device from pinned memory, GB/s.
    pub pinned_gb_per_s: f64,
    /// Host to device from pageable memory, GB/s.
    pub pageable_gb_per_s: f64,
    /// Device to pinned memory, GB/s.
    pub read_back_gb_per_s: f64,
    /// Four bytes from the device, microseconds until the host has them.
    pub transfer_us: f64,
    /// Launching a graph of one kernel and waiting for it, microseconds.
    pub launch_us: f64,
    /// One more kernel in a graph, microseconds.
    pub kernel_us: f64,
    /// One token's activations to a thread that polls and back, microseconds.
    pub handoff_us: f64,
    /// Device memory that the driver took for modules, graphs and cuBLASLt after the context was there, bytes.
    pub driver_bytes: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProbeArgs {
    data: Ptr,
    n: u64,
    out: Ptr,
    to_host: Ptr,
    from_host: Ptr,
    asked: Ptr,
    answered: Ptr,
    n_rounds: u32,
    n_floats: u32,
}
// SAFETY: mirrors ProbeArgs in probe.cu, which compares sizes.
unsafe impl Args for ProbeArgs {}

/// The program of the measuring kernels.
pub fn program() -> Program {
    Program::new("probe.cu", include_str!("probe.cu")).args::<ProbeArgs>("PROBE_ARGS")
}

/// Two events on the stream of a device.
struct Timer<'d> {
    device: &'d Device,
    events: [sys::CUevent; 2],
}

impl<'d> Timer<'d> {
    fn new(device: &'d Device) -> Result<Self, Error> {
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).during("creating an event");
        Ok(Self { device, events: [event()?, event()?] })
    }

    /// Least seconds on the device of some runs of what `queue` queues; the first run warms up.
    fn best(&self, mut queue: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        let mut best = f64::INFINITY;
        for pass in 0..=PASSES {
            let record = |event| {
                // SAFETY: event and stream are alive.
                unsafe { result::event::record(event, self.device.stream()) }.during("recording an event")
            };
            record(self.events[0])?;
            queue()?;
            record(self.events[1])?;
            self.device.wait("measuring")?;
            // SAFETY: both events were recorded and have passed.
            let ms = unsafe { result::event::elapsed(self.events[0], self.events[1]) }.during("reading a timer")?;
            if pass > 0 {
                best = best.min(f64::from(ms) * 1e-3);
            }
        }
        Ok(best)
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        for event in self.events {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

/// Measures `device`, which should be idle.
///
/// # Errors
/// Too little free memory, or what compiler and driver say.
pub fn measure(device: &Arc<Device>, compiler: Compiler) -> Result<Measured, Error> {
    let (free_before, _) = device.memory()?;
    let kernels = Kernels::new(device, compiler);
    kernels.prepare([program()])?;
    let function = |entry| kernels.function(&program(), entry, 0);
    let (noise, read_words, products) = (function("noise")?, function("read_words")?, function("products")?);
    let (tick, hand_off) = (function("tick")?, function("hand_off")?);
    let data_bytes = DATA_BYTES.min(free_before / 4).next_multiple_of(4096);
    let data = Arena::new(device, "measuring", data_bytes, data_bytes)?;
    let whole = Range { offset: 0, bytes: data_bytes };
    let out = Arena::new(device, "measuring", HANDOFF_FLOATS * 4, data_bytes)?;
    let mapped = Pinned::new(2 * LINE + 2 * HANDOFF_FLOATS * 4)?;
    let at = |offset: usize| mapped.device_ptr().map(|p| p.offset(offset));
    let mut args = ProbeArgs {
        data: data.ptr(whole),
        n: data_bytes as u64 / 16,
        out: out.ptr(Range::default()),
        asked: at(0)?,
        answered: at(LINE)?,
        to_host: at(2 * LINE)?,
        from_host: at(2 * LINE + HANDOFF_FLOATS * 4)?,
        n_rounds: 0,
        n_floats: HANDOFF_FLOATS as u32,
    };
    let timer = Timer::new(device)?;

    let grid = Launch::new(4 * device.n_sms(), 512);
    // SAFETY: the kernel writes `n` words of the arena.
    unsafe { noise.launch(device, grid, &args)? };
    // SAFETY: the kernel reads `n` words of the arena.
    let read_s = timer.best(|| unsafe { read_words.launch(device, grid, &args) })?;

    args.n_rounds = 2048;
    let blocks = 2 * device.n_sms();
    // SAFETY: the kernel touches no memory but `out`.
    let mma_s = timer.best(|| unsafe { products.launch(device, Launch::new(blocks, 256), &args) })?;
    let mma_ops = 2.0 * (16 * 16 * 8) as f64 * 8.0 * f64::from(args.n_rounds) * 8.0 * blocks as f64;

    let dense_s = match Dense::load().filter(|_| device.products() == Products::Library) {
        Some(dense) if data_bytes == DATA_BYTES => {
            let (n_rows, n) = (4096, 8192);
            let shape = dense::Shape { n_rows, n_out: n, n_in: n, ld_y: n, is_f16: false, y_f32: false, add: false };
            let (w, x) = (args.data, args.data.offset(2 * n * n));
            let y = x.offset(2 * n_rows * n);
            let workspace = y.offset(2 * n_rows * n);
            // SAFETY: 128 MiB, twice 64 MiB and the workspace lie one after the other in the arena.
            let seconds = timer.best(|| unsafe { dense.multiply(device, shape, (w, x, y), workspace) })?;
            Some(2.0 * (n_rows * n * n) as f64 / seconds / 1e12)
        }
        _ => None,
    };

    let copy_bytes = COPY_BYTES.min(data_bytes);
    let staged = Pinned::new(copy_bytes)?;
    let pageable = vec![1u8; copy_bytes];
    let mut small = [0u32];
    // SAFETY: source and destination hold the bytes and outlive the waits of the timer.
    let (pinned_s, pageable_s, read_back_s) = unsafe {
        let bytes = std::slice::from_raw_parts_mut(staged.as_ptr::<u8>(), copy_bytes);
        let to = |bytes: &[u8]| result::memcpy_htod_async(args.data.0, bytes, device.stream()).during("copying");
        (
            timer.best(|| to(bytes))?,
            timer.best(|| to(&pageable))?,
            timer.best(|| result::memcpy_dtoh_async(bytes, args.data.0, device.stream()).during("copying"))?,
        )
    };
    let least = |n: usize, work: &mut dyn FnMut() -> Result<(), Error>| {
        let mut best = Duration::MAX;
        for _ in 0..n {
            let start = Instant::now();
            work()?;
            best = best.min(start.elapsed());
        }
        Ok::<_, Error>(best.as_secs_f64())
    };
    let transfer_s = least(50, &mut || out.read(Range { offset: 0, bytes: 4 }, &mut small))?;

    let chain = |n: usize| {
        Graph::capture(device, || {
            // SAFETY: the kernel touches `out` alone, after it has waited for the kernels before it.
            (0..n).try_for_each(|_| unsafe { tick.launch_early(device, Launch::new(1, 32), &args) })
        })
    };
    let (one, many) = (chain(1)?, chain(GRAPH_KERNELS)?);
    let run = |graph: &Graph| {
        graph.launch(device)?;
        device.wait("measuring")
    };
    let launch_s = least(50, &mut || run(&one))?;
    let kernel_s = (least(10, &mut || run(&many))? - launch_s) / (GRAPH_KERNELS - 1) as f64;

    args.n_rounds = HANDOFF_ROUNDS as u32;
    let mut handoff_s = f64::INFINITY;
    for _ in 0..PASSES {
        handoff_s = handoff_s.min(hand_offs(device, &mapped, || {
            // SAFETY: the kernel touches `out` and the mapped memory, which outlive it.
            unsafe { hand_off.launch(device, Launch::new(1, 1024), &args) }
        })?);
    }

    let (free_after, _) = device.memory()?;
    let ours = data.bytes() + out.bytes();
    let gb = |bytes: usize, seconds: f64| bytes as f64 / seconds / 1e9;
    Ok(Measured {
        read_gb_per_s: gb(data_bytes, read_s),
        mma_tflops: mma_ops / mma_s / 1e12,
        dense_tflops: dense_s,
        pinned_gb_per_s: gb(copy_bytes, pinned_s),
        pageable_gb_per_s: gb(copy_bytes, pageable_s),
        read_back_gb_per_s: gb(copy_bytes, read_back_s),
        transfer_us: transfer_s * 1e6,
        launch_us: launch_s * 1e6,
        kernel_us: kernel_s * 1e6,
        handoff_us: handoff_s * 1e6,
        driver_bytes: free_before.saturating_sub(free_after).saturating_sub(ours),
    })
}

/// Seconds of one of [`HANDOFF_ROUNDS`] hand-offs of the kernel that `launch` starts, answered by this thread.
fn hand_offs(device: &Device, mapped: &Pinned, launch: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
    let base = mapped.as_ptr::<u8>();
    // SAFETY: the flags and the activations lie in the mapped memory, which is larger; the flags are touched atomically
    // by both sides, the activations between the flags of one side and the other.
    let (asked, answered) = unsafe { (&*base.cast::<AtomicU32>(), &*base.add(LINE).cast::<AtomicU32>()) };
    // SAFETY: within the mapped memory.
    let (inbox, outbox) = unsafe { (base.add(2 * LINE), base.add(2 * LINE + HANDOFF_FLOATS * 4)) };
    asked.store(0, Ordering::SeqCst);
    answered.store(0, Ordering::SeqCst);
    launch()?;
    let (mut first, mut last) = (Instant::now(), Instant::now());
    for round in 1..=HANDOFF_ROUNDS as u32 {
        let start = Instant::now();
        while asked.load(Ordering::Acquire) != round {
            if start.elapsed() > Duration::from_secs(1) {
                device.wait("measuring hand-offs")?;
                return Err(Error::Unsupported("the GPU does not see flags in host memory".into()));
            }
            std::hint::spin_loop();
        }
        // SAFETY: two parts of the mapped memory; the GPU waits for the answer.
        unsafe { std::ptr::copy_nonoverlapping(inbox, outbox, HANDOFF_FLOATS * 4) };
        answered.store(round, Ordering::Release);
        last = Instant::now();
        if round == 1 {
            first = last;
        }
    }
    device.wait("measuring hand-offs")?;
    Ok((last - first).as_secs_f64() / (HANDOFF_ROUNDS - 1) as f64)
}
