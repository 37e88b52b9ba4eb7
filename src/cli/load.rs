//! From what the user typed to a loaded engine: open, describe, plan, say the plan, load exactly it with a
//! progress bar, and compare planned with actual bytes.

use super::wishes::{self, WishArgs};
use crate::engine::{DeviceOptions, Engine, Error};
use crate::gguf::File;
use crate::machine::Machine;
use crate::plan::{self, Plan, Pool, Workload};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
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
    /// Instruction set of the CPU kernels: avx512, avx2 or portable [default: the best this processor has]
    #[arg(long, env = "TANDEM_CPU_ISA", value_name = "ISA", value_parser = parse_isa, help_heading = "Plan")]
    cpu_isa: Option<Isa>,
    /// Folder with NVIDIA's run-time compiler (libnvrtc), where it is not on the system's path
    #[arg(long, env = "TANDEM_CUDA_LIBS", value_name = "FOLDER", help_heading = "Plan")]
    cuda_libs: Option<PathBuf>,
}

fn parse_isa(text: &str) -> Result<Isa, String> {
    let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
    let Some(isa) = all.into_iter().find(|isa| isa.name() == text) else {
        return Err(format!("expected {}, found `{text}`", all.map(Isa::name).join(", ")));
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

/// Plans `opened` for `workload`, says the plan in one line on standard error, loads it, and says how planned
/// and actual bytes differ, if they do.
///
/// # Errors
/// A model that does not fit, or weights that cannot be loaded.
pub fn engine(opened: &Opened, args: &EngineArgs, workload: Workload) -> anyhow::Result<Loaded> {
    let options = DeviceOptions {
        isa: args.cpu_isa.unwrap_or_else(Isa::detect),
        cuda_libs: args.cuda_libs.clone(),
        cubin_cache: wishes::cache_dir().map(|folder| folder.join("cubins")),
    };
    let mut machine = args.wishes.machine()?;
    machine.host.isa = options.isa; // it decides how weights are packed, and with it the planned bytes
    let plan = args.wishes.plan(&opened.model, &machine, workload)?;
    let start = Instant::now();
    let engine = match load(opened, plan, &options) {
        Err(error @ (Error::Cuda(_) | Error::Shared { .. })) if !args.wishes.asks_for_gpu() => {
            eprintln!("{error}; running on the CPU");
            load(opened, args.wishes.on_cpu().plan(&opened.model, &machine, workload)?, &options)?
        }
        loaded => loaded?,
    };
    opened.file.check_unchanged()?;
    for (device, actual) in engine.weight_bytes() {
        let planned = engine.plan().bytes(device, Some(Pool::Weights));
        if actual != planned {
            eprintln!("weights take {actual} bytes on {device}; planned were {planned}");
        }
    }
    Ok(Loaded { engine, machine, load_time: start.elapsed() })
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
