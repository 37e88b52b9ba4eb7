//! From what the user typed to a loaded engine: open, describe, plan, say the plan, load exactly it with a
//! progress bar, and compare planned with actual bytes afterwards.

use super::wishes::{self, WishArgs};
use crate::engine::{DeviceOptions, Engine, Error, ExpertUses, Session};
use crate::gguf::File;
use crate::machine::Machine;
use crate::plan::{self, Device, Plan, Pool, Wishes, Workload};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};
use tandem_cpu::Isa;

/// The story model, compiled in.
static BUNDLED: &[u8] = include_bytes!("../../models/story-q4_k_m.gguf");

/// A file and the model in it.
pub struct Opened {
    /// The file.
    pub file: File,
    /// Its model.
    pub model: tandem_spec::Model,
}

/// Opens `path`, or the bundled story model.
///
/// # Errors
/// A file that cannot be read, is not sound, or holds no supported model.
pub fn open(path: Option<&Path>) -> anyhow::Result<Opened> {
    let file = match path {
        Some(path) => File::open(path)?,
        None => File::from_bytes(BUNDLED, "bundled story model")?,
    };
    let model = crate::model::describe(&file)?;
    Ok(Opened { file, model })
}

/// Options of every command that loads a model.
#[derive(clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    wishes: WishArgs,
    /// Instruction set of the CPU kernels: amx, avx512, avxvnni, avx2 or portable [default: the best there is]
    #[arg(long, env = "TANDEM_CPU_ISA", value_name = "ISA", value_parser = parse_isa, help_heading = "Plan")]
    cpu_isa: Option<Isa>,
    /// Whether the logits of every token of a batch are asked for: `tandem logits`.
    #[arg(skip)]
    pub all_logits: bool,
    /// Whether to measure what the CPU does now, instead of planning with what is remembered: `tandem bench`.
    #[arg(skip)]
    pub measure_now: bool,
}

impl EngineArgs {
    /// Whether to measure, and this is the machine to plan for.
    pub fn measures_now(&self) -> bool {
        self.measure_now && self.wishes.machine.is_none()
    }
}

fn parse_isa(text: &str) -> Result<Isa, String> {
    let Some(isa) = Isa::by_name(text) else {
        return Err(format!("expected {}, found `{text}`", Isa::ALL.map(Isa::name).join(", ")));
    };
    if !isa.is_available() {
        return Err(format!("this processor has no {text}; the best it has is {}", Isa::detect().name()));
    }
    Ok(isa)
}

/// An engine, and what is known of where it runs.
pub struct Loaded {
    /// The engine.
    pub engine: Engine,
    /// The machine that its plan is for.
    pub machine: Machine,
    /// Time from the plan to the last packed weight.
    pub load_time: Duration,
}

impl Loaded {
    /// Tokens per second that are predicted after `depth` others where experts are missing on GPUs as often as in
    /// `uses`; `None` without any use.
    pub fn rate_for(&self, uses: &ExpertUses, depth: usize) -> Option<f64> {
        let plan = self.engine.plan();
        plan.rates_at(self.engine.model(), &self.machine, depth, Some(&uses.misses()?)).map(|rates| rates.0)
    }
}

/// Plans `opened` for `workload`, says the plan in one line on standard error, and loads it.
///
/// # Errors
/// A model that does not fit, or weights that cannot be loaded.
pub fn engine(opened: &Opened, args: &EngineArgs, workload: Workload) -> anyhow::Result<Loaded> {
    let saved = args.wishes.saved(&opened.model)?;
    let saved_isa = saved.as_ref().filter(|plan| plan.devices().contains(&Device::Cpu)).map(|plan| plan.isa);
    if let Some(isa) = saved_isa.filter(|isa| !isa.is_available()) {
        let (isa, best) = (isa.name(), Isa::detect().name());
        anyhow::bail!(
            "the plan is for {isa} kernels, the best that this processor has is {best} (make the plan again here)"
        );
    }
    let wishes = Wishes { all_logits: args.all_logits, ..args.wishes.wishes(workload) };
    let options = DeviceOptions {
        isa: saved_isa.or(args.cpu_isa).unwrap_or_else(Isa::detect),
        cuda_libs: args.wishes.cuda_libs.clone(),
        cubin_cache: wishes::cache_dir().map(|folder| folder.join("cubins")),
    };
    let mut machine = args.wishes.machine()?;
    if machine.host.isa != options.isa {
        machine.host.kernels.clear(); // rates of other kernels
        machine.host.isa = options.isa; // it decides how weights are packed, and with it the planned bytes
    }
    if args.measures_now() {
        let start = Instant::now();
        let threads = saved.as_ref().map(|plan| plan.threads).or(wishes.threads);
        machine.host.measure_now(threads.unwrap_or(machine.host.threads), &opened.model);
        // The peak that the system tells is the model's from here on, where it lets us begin again.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        tracing::info!("cpu: rates measured in {:.2} s", start.elapsed().as_secs_f64());
    }
    let plan = match saved {
        Some(plan) => plan,
        None => args.wishes.plan(&opened.model, &machine, &wishes)?,
    };
    if let Some(note) = &machine.gpu_note
        && !args.wishes.leaves_gpu_out()
    {
        eprintln!("{note}; running on the CPU");
    }
    let start = Instant::now();
    let engine = match load(opened, plan, &options) {
        Err(error @ Error::Cuda(_)) if !args.wishes.asks_for_gpu() => {
            eprintln!("{error}; running on the CPU");
            machine.gpus.clear();
            load(opened, args.wishes.plan(&opened.model, &machine, &Wishes { vram: Vec::new(), ..wishes })?, &options)?
        }
        loaded => loaded?,
    };
    opened.file.check_unchanged()?;
    Ok(Loaded { engine, machine, load_time: start.elapsed() })
}

/// Planned and actual bytes of a pool on a device.
#[derive(serde::Serialize)]
pub struct Memory {
    device: Device,
    pool: Pool,
    planned_bytes: u64,
    actual_bytes: i64,
}

impl Memory {
    /// Whether the two are what they must be: equal where tandem allocates; copies of states may be fewer than planned.
    fn is_right(&self) -> bool {
        let (planned, actual) = (self.planned_bytes as i64, self.actual_bytes);
        if self.pool == Pool::Snapshots { actual <= planned } else { !self.pool.is_ours() || actual == planned }
    }
}

/// Planned against actual bytes of everything that tandem allocates and of what drivers take, by device and pool.
///
/// # Errors
/// What a driver says.
pub fn memory(engine: &Engine, session: &Session) -> anyhow::Result<Vec<Memory>> {
    let plan = engine.plan();
    let mut actual: BTreeMap<(Device, Pool), i64> = BTreeMap::new();
    for (device, pool, bytes) in engine.bytes(session.states()) {
        *actual.entry((device, pool)).or_default() += bytes as i64;
    }
    actual.insert((Device::Cpu, Pool::Snapshots), session.snapshot_bytes() as i64);
    for (device, bytes) in engine.driver_bytes(session.states())? {
        actual.insert((device, Pool::Driver), bytes);
    }
    for entry in plan.account.iter().filter(|e| e.pool != Pool::Reserve) {
        actual.entry((entry.device, entry.pool)).or_default();
    }
    let row = |((device, pool), actual_bytes)| {
        let planned_bytes = plan.bytes(device, Some(pool));
        Memory { device, pool, planned_bytes, actual_bytes }
    };
    Ok(actual.into_iter().map(row).filter(|m| m.planned_bytes > 0 || m.actual_bytes != 0).collect())
}

/// One line: that the bytes are those of the plan, or where they are not; what drivers took apart.
pub fn memory_line(memory: &[Memory]) -> String {
    let mib = |bytes: i64| bytes as f64 / f64::from(1 << 20);
    let wrong: Vec<String> = memory
        .iter()
        .filter(|m| !m.is_right())
        .map(|m| format!("{} {}: {} bytes, planned {}", m.device, m.pool.name(), m.actual_bytes, m.planned_bytes))
        .collect();
    let mut parts = vec![if wrong.is_empty() { "bytes as planned".into() } else { wrong.join(", ") }];
    parts.extend(memory.iter().filter(|m| m.pool == Pool::Driver).map(|m| {
        format!("{} driver {:.1} MiB, planned {:.1}", m.device, mib(m.actual_bytes), mib(m.planned_bytes as i64))
    }));
    parts.join(" | ")
}

fn load(opened: &Opened, plan: Plan, options: &DeviceOptions) -> Result<Engine, Error> {
    eprintln!("{}", plan::summary(&plan));
    let bar = progress_bar(Engine::planned_weight_bytes(&plan));
    let engine = Engine::load(opened.model.clone(), plan, options, &opened.file, &|done| bar.set_position(done));
    bar.finish_and_clear();
    engine
}

/// A bar on standard error where a terminal looks, else nothing.
fn progress_bar(n_bytes: u64) -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
        .expect("a template without mistakes");
    indicatif::ProgressBar::new(n_bytes).with_style(style)
}
