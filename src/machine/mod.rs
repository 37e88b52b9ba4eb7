//! Facts about a machine: memory, processor, GPUs and their measured rates. The planner reads nothing else
//! about hardware, so a plan can be made for a machine that is not here. This module measures and remembers;
//! it decides nothing.

mod kernels;
mod known;
mod probe;

pub use known::{known, known_names};
pub use probe::{Options, here};

use serde::{Deserialize, Serialize};
use tandem_cpu::Isa;
use tandem_spec::TensorType;

/// A machine as the planner sees it. Memory in bytes, bandwidths in GB/s (10^9 bytes), latencies in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What a person calls it.
    pub name: String,
    /// Processor and main memory.
    pub host: Host,
    /// GPUs by CUDA index; empty on a machine without any.
    pub gpus: Vec<Gpu>,
    /// Why no GPU can be used and what to install, where there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_note: Option<String>,
}

impl Machine {
    /// Whether a plan can be made from facts that somebody wrote down: rates are positive, and memory is less than
    /// an EiB.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        const BYTES_MAX: u64 = 1 << 60;
        let host = &self.host;
        let (counts, is_ascending) = (host.read.iter().map(|r| r.threads), host.read.is_sorted_by_key(|r| r.threads));
        if host.read.is_empty() || !is_ascending || counts.chain([host.threads]).any(|n| n == 0) {
            return Err("`threads` and those of `read` must be at least 1, and `read` ascend and not be empty".into());
        }
        let mut rates: Vec<f64> = host.read.iter().map(|r| r.gb_per_s).chain([host.copy_gb_per_s]).collect();
        rates.extend(
            host.kernels
                .iter()
                .flat_map(|k| [k.decode_gb_per_s, k.prompt_gflops, k.experts_gb_per_s, k.experts_prompt_gflops]),
        );
        let (mut bytes, mut latencies) = (vec![host.ram_total, host.ram_available], Vec::new());
        for g in &self.gpus {
            rates.extend([g.bandwidth_gb_per_s, g.mma_tflops, g.pinned_gb_per_s].into_iter().chain(g.dense_tflops));
            rates.extend([g.pageable_gb_per_s, g.read_back_gb_per_s]);
            latencies.extend([g.transfer_us, g.launch_us, g.kernel_us, g.handoff_us]);
            bytes.extend([g.vram_total, g.vram_free, g.driver_bytes]);
        }
        if rates.iter().any(|r| *r <= 0.0) || latencies.iter().any(|t| *t < 0.0) {
            return Err("rates must be larger than 0, and latencies not negative".into());
        }
        if bytes.iter().any(|n| *n >= BYTES_MAX) {
            return Err(format!("memory must be less than {BYTES_MAX} bytes"));
        }
        Ok(())
    }
}

/// Processor and main memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Model name of the processor.
    pub cpu: String,
    /// Kernels it runs: `amx`, `avx512`, `avxvnni`, `avx2` or `portable`.
    #[serde(with = "isa_name")]
    pub isa: Isa,
    /// Worker threads that make sense: physical cores, within affinity and the CPU quota of the cgroup.
    pub threads: usize,
    /// Main memory, within the limit of the cgroup.
    pub ram_total: u64,
    /// Main memory that can be had without swapping.
    pub ram_available: u64,
    /// Read bandwidth by number of threads, ascending in `threads`; at least one entry.
    pub read: Vec<ReadRate>,
    /// Bytes copied from one place of main memory to another with [`Host::threads`] threads, GB/s.
    pub copy_gb_per_s: f64,
    /// Rates of the kernels, where they were measured on this machine.
    #[serde(default)]
    pub kernels: Vec<KernelRate>,
}

impl Host {
    /// Read bandwidth of `threads` threads, GB/s: measured counts, straight lines between, flat beyond.
    pub fn read_gb_per_s(&self, threads: usize) -> f64 {
        let at = |i: usize| (self.read[i].threads as f64, self.read[i].gb_per_s);
        let t = threads as f64;
        match self.read.iter().position(|r| r.threads >= threads) {
            None => self.read.last().expect("facts have at least one read rate").gb_per_s,
            Some(0) => at(0).1 * t / at(0).0,
            Some(i) => {
                let ((t0, r0), (t1, r1)) = (at(i - 1), at(i));
                r0 + (r1 - r0) * (t - t0) / (t1 - t0)
            }
        }
    }

    /// The measured kernel of `ty`, or of the measured type that is nearest in bytes per weight; none for plain floats.
    pub fn kernel(&self, ty: TensorType) -> Option<&KernelRate> {
        let bytes_per_weight = |ty: TensorType| ty.row().block_bytes as f64 / ty.row().block_len as f64;
        let distance = |k: &KernelRate| (bytes_per_weight(k.ty) / bytes_per_weight(ty)).ln().abs();
        self.kernels.iter().filter(|_| ty.is_quantised()).min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }
}

/// Bandwidth of reading main memory with so many threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadRate {
    /// Threads that read at the same time.
    pub threads: usize,
    /// Sum over the threads, GB/s.
    pub gb_per_s: f64,
}

/// One stage of a block on the CPU: barrier, and the serial pieces between (norm, quantisation), microseconds.
pub(crate) const CPU_STAGE_US: f64 = 4.0;

/// Tokens of an expert in the prompt that [`KernelRate::experts_prompt_gflops`] is measured with: 512 tokens of a
/// 35B-A3B.
pub const EXPERT_TOKENS: usize = 16;

/// What the CPU kernels reach on weights of one type, with [`Host::threads`] threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRate {
    /// Tensor type, as ggml writes it.
    pub ty: TensorType,
    /// One token: bytes of weights per second, GB/s.
    pub decode_gb_per_s: f64,
    /// Routed experts of one token, a share of a mixture: bytes of their weights per second beside what its stages cost
    /// anyway, GB/s. They lie here and there, and are too small to stream at the rate of large matrices.
    pub experts_gb_per_s: f64,
    /// Many tokens: operations (two per weight and token) per second, 10^9/s.
    pub prompt_gflops: f64,
    /// The same of routed experts where each has about [`EXPERT_TOKENS`] tokens, which share the decoding of its
    /// weights.
    pub experts_prompt_gflops: f64,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Model name.
    pub name: String,
    /// Compute capability, major and minor: `[8, 9]`.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub n_sms: usize,
    /// Memory of the card.
    pub vram_total: u64,
    /// Memory free after the context exists and the modules are loaded.
    pub vram_free: u64,
    /// Device memory that the driver takes beside the context, for modules, graphs and cuBLASLt.
    pub driver_bytes: u64,
    /// Reading device memory, GB/s.
    pub bandwidth_gb_per_s: f64,
    /// 16-bit products through `mma.sync`, 10^12 operations per second (two per weight and token).
    pub mma_tflops: f64,
    /// The same through cuBLASLt, on chips where the prompt kernels use it.
    #[serde(default)]
    pub dense_tflops: Option<f64>,
    /// Host to device from pinned memory, GB/s.
    pub pinned_gb_per_s: f64,
    /// Host to device from pageable memory, GB/s.
    pub pageable_gb_per_s: f64,
    /// Device to pinned memory, GB/s.
    pub read_back_gb_per_s: f64,
    /// A few bytes from the device to the host, microseconds.
    pub transfer_us: f64,
    /// Launching a graph and waiting for it, microseconds.
    pub launch_us: f64,
    /// One kernel with nothing in it in a replayed graph, microseconds.
    pub kernel_us: f64,
    /// Handing one token's activations to the CPU and taking the result back inside a kernel, microseconds.
    pub handoff_us: f64,
}

/// [`Isa`] as its name.
pub(crate) mod isa_name {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use tandem_cpu::Isa;

    pub fn serialize<S: Serializer>(isa: &Isa, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(isa.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Isa, D::Error> {
        let name = String::deserialize(deserializer)?;
        let names = || Isa::ALL.map(Isa::name).join(", ");
        Isa::by_name(&name).ok_or_else(|| D::Error::custom(format!("instruction set `{name}` is none of {}", names())))
    }
}
