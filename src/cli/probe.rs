//! `tandem probe`: the facts about this machine that plans are made from.

use super::wishes::measuring;
use crate::machine::{self, Machine};
use anyhow::Result;
use std::io::Write;
use std::path::PathBuf;

/// Options of `tandem probe`.
#[derive(clap::Args, Debug)]
pub struct ProbeArgs {
    /// Measure again instead of using remembered rates
    #[arg(long, env = "TANDEM_PROBE_REFRESH")]
    pub refresh: bool,
    /// Print JSON, which `--machine FILE` of the other commands takes
    #[arg(long, env = "TANDEM_PROBE_JSON")]
    pub json: bool,
    /// List the shipped cards and hosts that `--machine` takes by name
    #[arg(long, env = "TANDEM_PROBE_KNOWN")]
    pub known: bool,
    /// Folder with NVIDIA's run-time compiler (libnvrtc), where it is not on the system's path
    #[arg(long, env = "TANDEM_CUDA_LIBS", value_name = "FOLDER")]
    pub cuda_libs: Option<PathBuf>,
}

/// Measures (or remembers) and prints.
///
/// # Errors
/// Standard output that cannot be written.
pub fn run(args: ProbeArgs) -> Result<()> {
    if args.known {
        let (cards, hosts) = machine::known_names();
        writeln!(std::io::stdout(), "cards: {}\nhosts: {}", cards.join(" "), hosts.join(" "))?;
        return Ok(());
    }
    let facts = machine::here(&measuring(args.cuda_libs.as_deref(), args.refresh));
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&facts)?)?;
    } else {
        write!(std::io::stdout(), "{}", text(&facts))?;
    }
    Ok(())
}

fn text(facts: &Machine) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let host = &facts.host;
    let rates: Vec<String> = host.read.iter().map(|r| format!("{:.1} GB/s with {}", r.gb_per_s, r.threads)).collect();
    let mut out = format!(
        "{}\ncpu    {}: {} kernels, {} threads\nram    {:.1} of {:.1} GiB available\nreads  {}\ncopies {:.1} GB/s with {}\n",
        facts.name,
        host.cpu,
        host.isa.name(),
        host.threads,
        gib(host.ram_available),
        gib(host.ram_total),
        rates.join(", "),
        host.copy_gb_per_s,
        host.threads
    );
    for kernel in &host.kernels {
        out += &format!(
            "{:<6} {:.1} GB/s one token, {:.0} GFLOP/s a prompt; experts {:.1} GB/s, {:.0} GFLOP/s\n",
            kernel.ty.name(),
            kernel.decode_gb_per_s,
            kernel.prompt_gflops,
            kernel.experts_gb_per_s,
            kernel.experts_prompt_gflops
        );
    }
    for (i, gpu) in facts.gpus.iter().enumerate() {
        let (major, minor) = gpu.compute_capability;
        let dense = gpu.dense_tflops.map_or(String::new(), |t| format!(", {t:.0} through cuBLASLt"));
        out += &format!(
            "cuda{i}  {}: compute {major}.{minor}, {} multiprocessors, {:.1} of {:.1} GiB free, driver {:.0} MiB\n",
            gpu.name,
            gpu.n_sms,
            gib(gpu.vram_free),
            gib(gpu.vram_total),
            gpu.driver_bytes as f64 / f64::from(1 << 20),
        );
        out += &format!(
            "       reads {:.0} GB/s, multiplies {:.0} TFLOP/s in 16 bits{dense}\n",
            gpu.bandwidth_gb_per_s, gpu.mma_tflops
        );
        out += &format!(
            "       from the host {:.1} GB/s pinned, {:.1} pageable, to the host {:.1}\n",
            gpu.pinned_gb_per_s, gpu.pageable_gb_per_s, gpu.read_back_gb_per_s
        );
        out += &format!(
            "       graph {:.1} us, each kernel {:.2}, token read back {:.1}, hand-off {:.1}\n",
            gpu.launch_us, gpu.kernel_us, gpu.transfer_us, gpu.handoff_us
        );
    }
    if let Some(note) = &facts.gpu_note {
        out += &format!("gpu    {note}\n");
    }
    out
}
