//! Measures this machine: what the operating system says, the read bandwidth of main memory by number of
//! threads, and the rates of the CPU kernels; and asks the driver for GPUs. Measured rates are remembered on disk; free memory is asked afresh every time.

use super::{Gpu, Host, KernelRate, Machine, ReadRate, isa_name, kernels, known, known_names};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Instant;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use tandem_cpu::Isa;

/// Changes when the measurement does, so that older files are measured again.
const CACHE_VERSION: u32 = 2;
/// Bytes read per pass: several times the last-level cache of any common processor.
const READ_BYTES: usize = 512 << 20;
/// Passes per thread count; the best one counts, since everything else on the machine only slows a pass down.
const READ_PASSES: usize = 3;

/// What is remembered.
#[derive(Serialize, Deserialize)]
struct Measured {
    version: u32,
    cpu: String,
    #[serde(with = "isa_name")]
    isa: Isa,
    threads: usize,
    read: Vec<ReadRate>,
    kernels: Vec<KernelRate>,
}

/// Facts about this machine. Rates come from `cache_dir` where they were measured before (a missing, damaged
/// or foreign file is measured again and replaced), unless `refresh`. Without a `cache_dir` nothing is kept.
pub fn here(cache_dir: Option<&Path>, refresh: bool) -> Machine {
    let system = System::new_with_specifics(
        RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(MemoryRefreshKind::nothing().with_ram()),
    );
    let (ram_total, ram_available) = memory(&system);
    let cpu = cpu_name(&system);
    let isa = Isa::detect();
    let threads = threads();
    let path = cache_dir.map(|dir| cache_path(dir, &cpu, threads));
    let remembered = path.as_deref().filter(|_| !refresh).and_then(read_cache);
    let measured = remembered
        .filter(|m| {
            m.version == CACHE_VERSION && m.cpu == cpu && m.isa == isa && m.threads == threads && !m.read.is_empty()
        })
        .unwrap_or_else(|| {
            let bytes = READ_BYTES.min((ram_available / 8) as usize).max(1 << 20);
            let fresh = Measured {
                version: CACHE_VERSION,
                cpu: cpu.clone(),
                isa,
                threads,
                read: read_rates(threads, bytes),
                kernels: kernels::measure(threads, isa),
            };
            if let Some(path) = &path {
                write_cache(path, &fresh);
            }
            fresh
        });
    let host = Host { cpu, isa, threads, ram_total, ram_available, read: measured.read, kernels: measured.kernels };
    let (gpus, gpu_note) = gpus();
    Machine { name: System::host_name().unwrap_or_else(|| "this machine".into()), host, gpus, gpu_note }
}

/// The GPUs that the driver shows, or why there are none.
fn gpus() -> (Vec<Gpu>, Option<String>) {
    match tandem_cuda::gpus() {
        Ok(found) => (found.iter().map(gpu).collect(), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    }
}

/// Facts of a GPU: memory as it is now; rates of the shipped card of that name, else what its bus and its
/// multiprocessors promise, reduced as the shipped cards are (`known/README.md`).
fn gpu(info: &tandem_cuda::GpuInfo) -> Gpu {
    let (major, minor) = info.compute_capability;
    let shipped = known_names().0.into_iter().find_map(|card| {
        let gpu = known(&format!("{card}+{}", known_names().1[0])).ok()?.gpus.swap_remove(0);
        (gpu.name == info.name).then_some(gpu)
    });
    // int8 operations per multiprocessor, 10^12/s, at common clocks.
    let int8_per_sm = match (major, minor) {
        (9, _) => 15.0,
        (12, _) | (8, 9) => 5.0,
        (8, 0) => 5.8,
        _ => 3.5,
    };
    let promised = Gpu {
        name: info.name.clone(),
        compute_capability: (major as u32, minor as u32),
        n_sms: info.n_sms,
        vram_total: info.total_bytes as u64,
        vram_free: info.free_bytes as u64,
        bandwidth_gb_per_s: if info.peak_bytes_per_s > 0.0 { 0.92 * info.peak_bytes_per_s / 1e9 } else { 300.0 },
        matmul_tflops: 0.25 * int8_per_sm * info.n_sms as f64,
        pinned_gb_per_s: 12.5,
        pageable_gb_per_s: 5.0,
        kernel_us: 1.0,
        handoff_us: 8.0,
    };
    match shipped {
        None => promised,
        Some(card) => {
            Gpu { n_sms: promised.n_sms, vram_total: promised.vram_total, vram_free: promised.vram_free, ..card }
        }
    }
}

/// Total and available main memory in bytes, within the limits of this process's cgroup.
fn memory(system: &System) -> (u64, u64) {
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(limits) = system.cgroup_limits() {
        total = total.min(limits.total_memory);
        // What the cgroup counts as used includes the page cache, which is given back on demand.
        available = available.min(limits.total_memory.saturating_sub(limits.rss));
    }
    (total, available)
}

fn cpu_name(system: &System) -> String {
    match system.cpus().first().map(|cpu| cpu.brand().trim()) {
        Some(brand) if !brand.is_empty() => brand.to_owned(),
        _ => "unknown processor".to_owned(),
    }
}

/// Physical cores, but no more threads than affinity and the CPU quota of the cgroup allow: a second thread on
/// a core adds no bandwidth, and more threads than the quota wait for each other at every barrier.
fn threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    System::physical_core_count().filter(|&n| n > 0).map_or(allowed, |cores| cores.min(allowed))
}

fn cache_path(dir: &Path, cpu: &str, threads: usize) -> PathBuf {
    let slug: String =
        cpu.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    dir.join(format!("machine-{slug}-{threads}.json"))
}

fn read_cache(path: &Path) -> Option<Measured> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

/// Written beside and renamed, so that a reader never sees half a file. A cache that can't be written costs
/// the next run a measurement and is no error.
fn write_cache(path: &Path, measured: &Measured) {
    let written = (|| {
        std::fs::create_dir_all(path.parent().expect("the file is in a directory"))?;
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::write(&beside, serde_json::to_string_pretty(measured)?)?;
        std::fs::rename(&beside, path)
    })();
    if let Err(error) = written {
        tracing::debug!("{}: measured rates not kept: {error}", path.display());
    }
}

/// Read bandwidth with 1, 2, 4, ... and `max_threads` threads over `n_bytes` of memory.
fn read_rates(max_threads: usize, n_bytes: usize) -> Vec<ReadRate> {
    // Written once: untouched pages would all be the same page of zeros.
    let words = vec![1u64; n_bytes / 8];
    let mut counts: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n < max_threads).collect();
    counts.push(max_threads);
    counts.into_iter().map(|threads| ReadRate { threads, gb_per_s: read_rate(&words, threads) }).collect()
}

/// Best of some passes over `words`, each thread reading its part. GB/s.
fn read_rate(words: &[u64], threads: usize) -> f64 {
    let parts: Vec<&[u64]> = words.chunks(words.len().div_ceil(threads)).collect();
    let barrier = &Barrier::new(parts.len());
    let best_pass = move |part: &[u64]| {
        let mut seconds = [0.0; READ_PASSES];
        for pass in &mut seconds {
            barrier.wait();
            let start = Instant::now();
            std::hint::black_box(part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
            barrier.wait();
            *pass = start.elapsed().as_secs_f64();
        }
        seconds.into_iter().fold(f64::INFINITY, f64::min)
    };
    let seconds = std::thread::scope(|scope| {
        let workers: Vec<_> = parts.iter().map(|part| scope.spawn(move || best_pass(part))).collect();
        workers.into_iter().map(|w| w.join().expect("a reading thread does not panic")).fold(0.0, f64::max)
    });
    size_of_val(words) as f64 / seconds / 1e9
}
