//! Options that decide a plan, shared by every command that loads or plans a model.

use crate::machine::{self, Machine};
use crate::plan::{self, Device, PlaceRule, Plan, Wishes, Workload};
use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use tandem_spec::{KvDtype, Model};

/// Reads a size in bytes: `12G`, `512M`, `1.5GiB` (powers of 1024), `12GB` (powers of 1000), or a plain number.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let base: f64 = match unit.get(1..).map(str::to_ascii_lowercase).as_deref() {
        Some("b") => 1000.0,
        None | Some("" | "ib") => 1024.0,
        _ => 0.0,
    };
    let power = match unit.get(..1).map(str::to_ascii_uppercase).as_deref() {
        None => Some(0),
        Some("K") => Some(1),
        Some("M") => Some(2),
        Some("G") => Some(3),
        Some("T") => Some(4),
        _ => None,
    };
    match (number.parse::<f64>(), power) {
        (Ok(n), Some(power)) if base > 0.0 && n.is_finite() && n * base.powi(power) < 2f64.powi(60) => {
            Ok((n * base.powi(power)) as u64)
        }
        _ => Err(format!("`{text}` is no size; write 12G, 512M, 1.5GiB (1024s) or 12GB (1000s)")),
    }
}

/// `--kv-dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KvDtypeArg {
    /// 2 bytes an element.
    Bf16,
    /// 4 bytes an element.
    F32,
}

impl From<KvDtypeArg> for KvDtype {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::Bf16 => KvDtype::Bf16,
            KvDtypeArg::F32 => KvDtype::F32,
        }
    }
}

/// An option that is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// Options that decide a plan.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Plan")]
pub struct WishArgs {
    /// GPU memory to use at most, one size per GPU (12G or 12G,24G; 0 leaves the GPU out) [default: what is free]
    #[arg(long, env = "TANDEM_VRAM", value_name = "SIZE", value_delimiter = ',', value_parser = parse_size)]
    pub vram: Vec<u64>,
    /// Main memory to use at most [default: what is available]
    #[arg(long, env = "TANDEM_RAM", value_name = "SIZE", value_parser = parse_size)]
    pub ram: Option<u64>,
    /// Context length in tokens [default: the trained length, at most 8192, or what prompt and generation need]
    #[arg(long, env = "TANDEM_CTX", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// How keys and values are stored [default: bf16 for models with delta-net layers, f32 for others]
    #[arg(long, env = "TANDEM_KV_DTYPE", value_name = "TYPE")]
    pub kv_dtype: Option<KvDtypeArg>,
    /// Tokens of the largest batch [default: what is fastest for the prompt]
    #[arg(long, env = "TANDEM_BATCH", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: Option<u32>,
    /// CPU worker threads [default: physical cores that this process may use]
    #[arg(long, env = "TANDEM_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=plan::THREADS_MAX as i64))]
    pub threads: Option<u32>,
    /// Whether a mixture's experts on the GPU follow the routing, where main memory has room for all [default: on]
    #[arg(long, env = "TANDEM_EXPERT_CACHE", value_name = "on|off")]
    pub expert_cache: Option<Switch>,
    /// Place blocks by name: 'blk.(0-9).ffn=cpu', 'blk.*.moe=cuda0:25%', 'head=cpu'; can be repeated, later ones win
    #[arg(long, env = "TANDEM_PLACE", value_name = "RULE", value_delimiter = ';', value_parser = PlaceRule::parse)]
    pub place: Vec<PlaceRule>,
    /// Whole layers on the GPU, counted from the end, the head being the last (as in llama.cpp)
    #[arg(long, env = "TANDEM_GPU_LAYERS", value_name = "N")]
    pub gpu_layers: Option<usize>,
    /// Plan for this machine instead of this one: a file that `tandem probe --json` wrote, or shipped parts
    /// joined by + (rtx4070ti-12gb+ddr5-64gb; `tandem probe --known` lists them)
    #[arg(long, env = "TANDEM_MACHINE", value_name = "FILE|NAME")]
    pub machine: Option<String>,
    /// Run the plan in this file (written by `tandem plan --json`) instead of making one
    #[arg(long, env = "TANDEM_PLAN", value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Folder with NVIDIA's run-time compiler (libnvrtc), where it is not on the system's path
    #[arg(long, env = "TANDEM_CUDA_LIBS", value_name = "FOLDER")]
    pub cuda_libs: Option<PathBuf>,
}

impl WishArgs {
    /// The wishes, for a run of `workload`.
    pub fn wishes(&self, workload: Workload) -> Wishes {
        Wishes {
            vram: self.vram.clone(),
            ram: self.ram,
            n_ctx: self.ctx.map(|n| n as usize),
            n_slots: 1,
            n_batch: self.batch.map(|n| n as usize),
            kv_dtype: self.kv_dtype.map(KvDtype::from),
            all_logits: false,
            threads: self.threads.map(|n| n as usize),
            workload,
            expert_cache: self.expert_cache != Some(Switch::Off),
            place: self.place.clone(),
            gpu_layers: self.gpu_layers,
        }
    }

    /// The plan: the one in `--plan FILE`, else the fastest on `machine` that `wishes` allow.
    ///
    /// # Errors
    /// A plan file of another model; a refusal of the planner, with its numbers.
    pub fn plan(&self, model: &Model, machine: &Machine, wishes: &Wishes) -> Result<Plan> {
        match self.saved(model)? {
            Some(saved) => Ok(saved),
            None => Ok(plan::plan(model, machine, wishes)?),
        }
    }

    /// The plan in `--plan FILE`.
    ///
    /// # Errors
    /// A file that cannot be read, or a plan of another model.
    pub fn saved(&self, model: &Model) -> Result<Option<Plan>> {
        let Some(path) = &self.plan else { return Ok(None) };
        let saved: Plan = read_json(path, "tandem plan --json")?;
        saved.check(model).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        Ok(Some(saved))
    }

    /// Whether the user said what a GPU has to do, so that doing without it would be against their wish.
    pub fn asks_for_gpu(&self) -> bool {
        let gpu = |rule: &PlaceRule| rule.device != Device::Cpu;
        self.plan.is_some()
            || self.vram.iter().any(|bytes| *bytes > 0)
            || self.gpu_layers.is_some_and(|n| n > 0)
            || self.place.iter().any(gpu)
    }

    /// Whether the user wants no GPU, so that a missing one needs no word.
    pub fn leaves_gpu_out(&self) -> bool {
        let no_memory = !self.vram.is_empty() && self.vram.iter().all(|bytes| *bytes == 0);
        no_memory || self.gpu_layers == Some(0)
    }

    /// The machine to plan for: the one asked for, else this one.
    pub fn machine(&self) -> Result<Machine> {
        match &self.machine {
            None => Ok(machine::here(&measuring(self.cuda_libs.as_deref(), false))),
            Some(name) if Path::new(name).exists() => {
                let facts: Machine = read_json(Path::new(name), "tandem probe --json")?;
                facts.check().map_err(|e| anyhow!("{name}: {e}"))?;
                Ok(facts)
            }
            Some(name) => machine::known(name).map_err(|e| anyhow!(e)),
        }
    }
}

/// How this machine's facts are measured.
pub fn measuring(cuda_libs: Option<&Path>, refresh: bool) -> machine::Options {
    machine::Options { cache_dir: cache_dir(), cuda_libs: cuda_libs.map(Path::to_owned), refresh }
}

/// Where measured facts are kept: `$XDG_CACHE_HOME/tandem`, else `~/.cache/tandem`.
pub fn cache_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    Some(absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?.join("tandem"))
}

/// Reads a file that `command` writes.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path, command: &str) -> Result<T> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{}: cannot read this file (of `{command}`)", path.display()))?;
    let not_written =
        || format!("{}: not as `{command}` of this version writes it; correct it or write it again", path.display());
    serde_json::from_str(&text).with_context(not_written)
}
