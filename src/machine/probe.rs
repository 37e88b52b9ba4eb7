//! Measures this machine: what the operating system says, how fast main memory is read (by number of threads) and
//! copied, the rates of the CPU kernels, and what each GPU does. Measured rates are remembered on disk; free memory is
//! asked afresh every time.

use super::{Gpu, Host, KernelRate, Machine, ReadRate, isa_name, kernels, known, known_names};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Instant;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use tandem_cpu::{Isa, ReadTest};
use tandem_cuda::{Compiler, GpuInfo};
use tandem_spec::{Block, Model, TensorType, Weight};

/// Changes when the measurement does, so that older files are measured again.
const CACHE_VERSION: u32 = 9;
/// Bytes read per pass, and of weights: many times the last-level cache of a desktop, two or three times those of the
/// servers at hand (480 and 300 MB), which read 16 GiB no slower than passes differ anyway.
const READ_BYTES: usize = 1 << 30;
/// Passes per thread count; the best one counts, since everything else on the machine only slows a pass down.
const READ_PASSES: usize = 5;
/// How long rates of one token are measured where those of the moment are asked for: on shared machines they differ by
/// a tenth from one fifth of a second to the next.
const SECONDS_NOW: f64 = 2.0;

/// Where measured rates are kept, and how to come to new ones.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Folder of remembered rates and compiled kernels; `None`: nothing is kept.
    pub cache_dir: Option<PathBuf>,
    /// Folder with NVRTC, where it is not on the system's path.
    pub cuda_libs: Option<PathBuf>,
    /// Whether to measure again what is remembered.
    pub refresh: bool,
}

/// What is remembered.
#[derive(Serialize, Deserialize)]
struct Measured {
    version: u32,
    cpu: String,
    #[serde(with = "isa_name")]
    isa: Isa,
    threads: usize,
    read: Vec<ReadRate>,
    copy_gb_per_s: f64,
    kernels: Vec<KernelRate>,
    gpus: Vec<Gpu>,
}

impl Measured {
    /// Measures the host.
    fn host(cpu: &str, isa: Isa, threads: usize, ram_available: u64) -> Self {
        let bytes = bytes_to_read(ram_available);
        let powers = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|&n| n < threads);
        Self {
            version: CACHE_VERSION,
            cpu: cpu.into(),
            isa,
            threads,
            read: read_rates(powers.chain([threads]), bytes, isa),
            // Written once: untouched pages would all be the same page of zeros.
            copy_gb_per_s: copy_rate(vec![1u64; bytes / 8], threads),
            kernels: kernels::measure(threads, isa, bytes),
            gpus: Vec::new(),
        }
    }

    fn is_of(&self, cpu: &str, isa: Isa, threads: usize) -> bool {
        let same = self.version == CACHE_VERSION && self.cpu == cpu && self.isa == isa && self.threads == threads;
        same && !self.read.is_empty()
    }

    fn has_gpus(&self, found: &[GpuInfo]) -> bool {
        let names = found.iter().map(|info| (info.name.as_str(), info.n_sms));
        names.eq(self.gpus.iter().map(|gpu| (gpu.name.as_str(), gpu.n_sms)))
    }
}

/// Facts about this machine. Rates come from the cache where they were measured before (a missing, damaged or
/// foreign file is measured again and replaced), unless `options.refresh`.
pub fn here(options: &Options) -> Machine {
    let (ram_total, ram_available) = memory();
    let cpu = cpu_name();
    let isa = Isa::detect();
    let threads = threads();
    let path = options.cache_dir.as_deref().map(|dir| cache_path(dir, &cpu, threads));
    let remembered = path.as_deref().filter(|_| !options.refresh).and_then(read_cache);
    let remembered = remembered.filter(|m| m.is_of(&cpu, isa, threads));
    let mut is_new = remembered.is_none();
    let mut measured = remembered.unwrap_or_else(|| Measured::host(&cpu, isa, threads, ram_available));
    let (found, gpu_note) = match usable_gpus(options) {
        Ok(found) => (found, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    if !measured.has_gpus(&found) && !found.is_empty() {
        measured.gpus = found.iter().map(|info| measure_gpu(info, options)).collect();
        is_new = true;
    }
    if let Some(path) = path.filter(|_| is_new) {
        write_cache(&path, &measured);
    }
    let with_memory = |(info, gpu): (&GpuInfo, &Gpu)| Gpu {
        vram_total: info.total_bytes as u64,
        vram_free: info.free_bytes as u64,
        ..gpu.clone()
    };
    let gpus = found.iter().zip(&measured.gpus).map(with_memory).collect();
    let Measured { read, copy_gb_per_s, kernels, .. } = measured;
    let host = Host { cpu, isa, threads, ram_total, ram_available, read, copy_gb_per_s, kernels };
    Machine { name: System::host_name().unwrap_or_else(|| "this machine".into()), host, gpus, gpu_note }
}

/// GB/s that `threads` threads read now, with the loads of `isa`; `None` where there is so little memory that they
/// would read a cache.
fn read_now(threads: usize, isa: Isa) -> Option<f64> {
    let bytes = bytes_to_read(memory().1);
    (bytes >= READ_BYTES / 2).then(|| read_rates([threads], bytes, isa)[0].gb_per_s)
}

impl Host {
    /// Measures again what changes from minute to minute where a machine is shared: how fast `threads` threads read
    /// main memory, and their kernels for the measured types that stand for those of `model`. They are
    /// [`Host::threads`] from then on.
    pub fn measure_now(&mut self, threads: usize, model: &Model) {
        let gb_per_s = read_now(threads, self.isa).unwrap_or_else(|| self.read_gb_per_s(threads));
        let mut stand_for_types = Vec::new();
        let mut note = |w: &Weight| stand_for_types.extend(self.kernel(w.ty).map(|k| k.ty));
        model.blocks.iter().for_each(|block| block.for_each(&mut note));
        let has_experts = model.blocks.iter().any(|block| matches!(block, Block::Moe(_)));
        let (more, faster) = (threads as f64 / self.threads as f64, gb_per_s / self.read_gb_per_s(self.threads));
        for k in &mut self.kernels {
            k.decode_gb_per_s *= faster;
            k.experts_gb_per_s *= faster;
            k.prompt_gflops *= more;
            k.experts_prompt_gflops *= more;
        }
        let mut measured = self.kernels.iter_mut().filter(|k| stand_for_types.contains(&k.ty)).collect::<Vec<_>>();
        let types: Vec<TensorType> = measured.iter().map(|k| k.ty).collect();
        let bytes = bytes_to_read(self.ram_available);
        let test = kernels::Test { types: &types, threads, isa: self.isa, bytes, decode_seconds: SECONDS_NOW };
        let test = Some(test).filter(|_| !types.is_empty());
        // Where there is too little memory to measure, what is remembered stays.
        if let Some(Ok(rates)) = test.map(kernels::dense) {
            measured.iter_mut().zip(rates).for_each(|(k, of)| (k.decode_gb_per_s, k.prompt_gflops) = of);
        }
        if let Some(Ok(rates)) = test.filter(|_| has_experts).map(kernels::experts) {
            measured.iter_mut().zip(rates).for_each(|(k, of)| (k.experts_gb_per_s, k.experts_prompt_gflops) = of);
        }
        (self.threads, self.read) = (threads, vec![ReadRate { threads, gb_per_s }]);
    }
}

fn compiler(options: &Options) -> Result<Compiler, tandem_cuda::Error> {
    Compiler::new(options.cuda_libs.as_deref(), options.cache_dir.as_ref().map(|dir| dir.join("cubins")))
}

/// The GPUs that the driver shows and that kernels can be compiled for, or why there are none.
fn usable_gpus(options: &Options) -> Result<Vec<GpuInfo>, tandem_cuda::Error> {
    let found = tandem_cuda::gpus()?;
    compiler(options)?;
    Ok(found)
}

/// Facts of a GPU: measured, or where that fails (too little free memory) those of the shipped card of that name,
/// or else what its bus and its multiprocessors promise.
fn measure_gpu(info: &GpuInfo, options: &Options) -> Gpu {
    let measured = tandem_cuda::Device::open(info.ordinal)
        .and_then(|device| tandem_cuda::probe::measure(&Arc::new(device), compiler(options)?));
    let promised = promised(info);
    match measured {
        Ok(m) => Gpu {
            driver_bytes: m.driver_bytes as u64 + DRIVER_SPARE,
            bandwidth_gb_per_s: m.read_gb_per_s,
            mma_tflops: m.mma_tflops,
            dense_tflops: m.dense_tflops,
            pinned_gb_per_s: m.pinned_gb_per_s,
            pageable_gb_per_s: m.pageable_gb_per_s,
            read_back_gb_per_s: m.read_back_gb_per_s,
            transfer_us: m.transfer_us,
            launch_us: m.launch_us,
            kernel_us: m.kernel_us,
            handoff_us: m.handoff_us,
            ..promised
        },
        Err(error) => {
            tracing::warn!("{}: not measured: {error}", info.name);
            promised
        }
    }
}

/// What the modules and graphs of a model take beside those of the probe.
const DRIVER_SPARE: u64 = 8 << 20;

/// Facts of a GPU that was not measured (`known/README.md` says how vendors' figures are reduced).
fn promised(info: &GpuInfo) -> Gpu {
    let (major, minor) = info.compute_capability;
    let here = |gpu: Gpu| Gpu {
        name: info.name.clone(),
        n_sms: info.n_sms,
        vram_total: info.total_bytes as u64,
        vram_free: info.free_bytes as u64,
        ..gpu
    };
    let shipped = known_names().0.into_iter().find_map(|card| {
        let gpu = known(&format!("{card}+{}", known_names().1[0])).ok()?.gpus.swap_remove(0);
        (gpu.name == info.name).then_some(gpu)
    });
    // 16-bit operations per multiprocessor, 10^12/s, at common clocks.
    let mma_per_sm = match (major, minor) {
        (9, _) => 4.0,
        (8, 0) => 2.6,
        (12, _) | (8, 9) => 1.1,
        _ => 0.8,
    };
    here(shipped.unwrap_or_else(|| Gpu {
        name: String::new(),
        compute_capability: (major as u32, minor as u32),
        n_sms: 0,
        vram_total: 0,
        vram_free: 0,
        driver_bytes: 2 * DRIVER_SPARE,
        bandwidth_gb_per_s: if info.peak_bytes_per_s > 0.0 { 0.92 * info.peak_bytes_per_s / 1e9 } else { 300.0 },
        mma_tflops: mma_per_sm * info.n_sms as f64,
        dense_tflops: None,
        pinned_gb_per_s: 12.5,
        pageable_gb_per_s: 5.0,
        read_back_gb_per_s: 12.5,
        transfer_us: 8.0,
        launch_us: 7.0,
        kernel_us: 1.0,
        handoff_us: 8.0,
    }))
}

/// Total and available main memory in bytes, within the limits of this process's cgroup.
fn memory() -> (u64, u64) {
    let ram = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(ram);
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(limits) = system.cgroup_limits() {
        total = total.min(limits.total_memory);
        // What the cgroup counts as used includes the page cache, which is given back on demand.
        available = available.min(limits.total_memory.saturating_sub(limits.rss));
    }
    (total, available)
}

/// Bytes to measure with, where so many are available.
fn bytes_to_read(ram_available: u64) -> usize {
    READ_BYTES.min((ram_available / 8) as usize).max(1 << 20)
}

fn cpu_name() -> String {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
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

/// Read bandwidth over `bytes` by number of threads; 1 GB/s for each thread where there is no memory to read.
fn read_rates(counts: impl IntoIterator<Item = usize>, bytes: usize, isa: Isa) -> Vec<ReadRate> {
    let memory = ReadTest::new(bytes).ok();
    let rate = |threads| memory.as_ref().map_or(threads as f64, |memory| read_rate(memory, threads, isa));
    counts.into_iter().map(|threads| ReadRate { threads, gb_per_s: rate(threads) }).collect()
}

/// Best of some passes that copy one half of `words` to the other, each thread its part. GB/s copied.
fn copy_rate(mut words: Vec<u64>, threads: usize) -> f64 {
    let half = words.len() / 2;
    let (from, to) = words.split_at_mut(half);
    let part = half.div_ceil(threads).max(1);
    let mut seconds = f64::INFINITY;
    for _ in 0..READ_PASSES {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    8.0 * half as f64 / seconds / 1e9
}

/// Best of some passes over `memory`, each thread reading its part. GB/s.
fn read_rate(memory: &ReadTest, threads: usize, isa: Isa) -> f64 {
    let (barrier, n_bytes) = (&Barrier::new(threads), memory.n_bytes());
    let best_pass = move |i: usize| {
        let mut seconds = [0.0; READ_PASSES];
        for pass in &mut seconds {
            barrier.wait();
            let start = Instant::now();
            memory.read(isa, n_bytes * i / threads..n_bytes * (i + 1) / threads);
            barrier.wait();
            *pass = start.elapsed().as_secs_f64();
        }
        seconds.into_iter().fold(f64::INFINITY, f64::min)
    };
    let seconds = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|i| scope.spawn(move || best_pass(i))).collect();
        workers.into_iter().map(|w| w.join().expect("a reading thread does not panic")).fold(0.0, f64::max)
    });
    n_bytes as f64 / seconds / 1e9
}
