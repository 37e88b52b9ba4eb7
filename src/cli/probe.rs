//! `tandem probe`: the facts about this machine that plans are made from.

use super::wishes::cache_dir;
use crate::machine::{self, Machine};
use anyhow::Result;
use std::io::Write;

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
    #[arg(long, env = "TANDEM_PROBE_KNOWN", conflicts_with_all = ["refresh", "json"])]
    pub known: bool,
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
    let facts = machine::here(cache_dir().as_deref(), args.refresh);
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
        "{}\ncpu    {}: {} kernels, {} threads\nram    {:.1} of {:.1} GiB available\nreads  {}\n",
        facts.name,
        host.cpu,
        host.isa.name(),
        host.threads,
        gib(host.ram_available),
        gib(host.ram_total),
        rates.join(", ")
    );
    for kernel in &host.kernels {
        out += &format!(
            "{:<6} {:.1} GB/s one token, {:.0} GFLOP/s a prompt\n",
            kernel.ty.name(),
            kernel.decode_gb_per_s,
            kernel.prompt_gflops
        );
    }
    for (i, gpu) in facts.gpus.iter().enumerate() {
        out += &format!(
            "cuda{i}  {}: compute {}.{}, {:.1} of {:.1} GiB free, {:.0} GB/s, host to device {:.0} GB/s pinned and {:.0} pageable, hand-off {:.1} us\n",
            gpu.name,
            gpu.compute_capability.0,
            gpu.compute_capability.1,
            gib(gpu.vram_free),
            gib(gpu.vram_total),
            gpu.bandwidth_gb_per_s,
            gpu.pinned_gb_per_s,
            gpu.pageable_gb_per_s,
            gpu.handoff_us
        );
    }
    if let Some(note) = &facts.gpu_note {
        out += &format!("gpu    {note}\n");
    }
    out
}
