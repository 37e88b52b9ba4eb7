//! `tandem plan`: where a model would run, every byte it takes and how fast it would be, without loading it.

use super::wishes::WishArgs;
use crate::gguf::File;
use crate::plan::{self, Workload};
use anyhow::{Context, Result};
use std::io::Write;
use std::path::PathBuf;

/// Options of `tandem plan`.
#[derive(clap::Args, Debug)]
pub struct PlanArgs {
    /// GGUF file (of a split set: the first)
    pub model: PathBuf,
    /// Tokens of the prompt to plan for
    #[arg(long, env = "TANDEM_PLAN_PROMPT", value_name = "N", default_value_t = Workload::default().prompt as u32)]
    pub prompt: u32,
    /// Tokens to generate to plan for
    #[arg(long, env = "TANDEM_PLAN_GENERATE", value_name = "N", default_value_t = Workload::default().generate as u32)]
    pub generate: u32,
    /// Print the plan as JSON; `--plan FILE` of the other commands runs it
    #[arg(long, env = "TANDEM_PLAN_JSON")]
    pub json: bool,
    /// Write a page with the picture of the plan
    #[arg(long, env = "TANDEM_PLAN_HTML", value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Say what more memory, another KV type, context or quantisation would change
    #[arg(long, env = "TANDEM_PLAN_WHY")]
    pub why: bool,
    /// What the plan has to respect.
    #[command(flatten)]
    pub wishes: WishArgs,
}

/// Makes the plan and prints it.
///
/// # Errors
/// A file that is not a sound model, a wish that cannot be met, a model that does not fit.
pub fn run(args: PlanArgs) -> Result<()> {
    let file = File::open(&args.model)?;
    let model = crate::model::describe(&file)?;
    let workload = Workload { prompt: args.prompt as usize, generate: args.generate as usize };
    let machine = args.wishes.machine()?;
    let wishes = args.wishes.wishes(workload);
    let made = args.wishes.plan(&model, &machine, &wishes)?;
    if let Some(path) = &args.html {
        std::fs::write(path, plan::html(&made, &model)).with_context(|| format!("{}: cannot write", path.display()))?;
    }
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&made)?)?;
        return Ok(());
    }
    write!(std::io::stdout(), "{}", plan::text(&made, &model))?;
    if args.why {
        let why = plan::why(&made, &model, &machine, &wishes);
        write!(std::io::stdout(), "\n{why}")?;
    }
    Ok(())
}
