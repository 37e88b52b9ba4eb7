//! `tandem logits`: raw logits of given tokens, for parity checks.

use super::load::{self, EngineArgs};
use super::usage;
use crate::plan::Workload;
use anyhow::Context;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use tandem_spec::Batch;

/// Arguments of `tandem logits`.
#[derive(clap::Args)]
pub struct LogitsArgs {
    /// Model file (GGUF); of a split set, its first file
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "IDS")]
    tokens: Vec<u32>,
    /// Tokens per batch; without it, as many as the plan allows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
    /// File to write; without it, standard output (which must not be a terminal)
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Writes little-endian f32 logits `[n_tokens, n_vocab]`.
///
/// # Errors
/// A model that cannot be opened, planned or loaded; tokens outside the vocabulary; a failed write.
pub fn run(mut args: LogitsArgs) -> anyhow::Result<()> {
    if args.out.is_none() && std::io::stdout().is_terminal() {
        return Err(usage("logits are raw numbers: give --out FILE, or redirect standard output"));
    }
    let opened = load::open(Some(&args.model))?;
    if let Some(id) = args.tokens.iter().find(|id| **id as usize >= opened.model.n_vocab) {
        let last = opened.model.n_vocab - 1;
        return Err(usage(format!("--tokens: token id {id} is outside the vocabulary (0 to {last})")));
    }
    let workload = Workload { prompt: args.tokens.len(), generate: 0 };
    args.engine.all_logits = true;
    let engine = load::engine(&opened, &args.engine, workload)?.engine;
    let n_ctx = engine.plan().n_ctx;
    if args.tokens.len() > n_ctx {
        return Err(usage(format!(
            "--tokens: {} tokens do not fit the context of {n_ctx}; raise --ctx",
            args.tokens.len()
        )));
    }
    let mut states = engine.states()?;
    let (mut out, name): (Box<dyn Write>, String) = match &args.out {
        Some(path) => {
            let file = std::fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            (Box::new(std::io::BufWriter::new(file)), path.display().to_string())
        }
        None => (Box::new(std::io::BufWriter::new(std::io::stdout().lock())), "standard output".into()),
    };
    let n_batch = engine.plan().n_batch;
    let chunk = args.chunk.map_or(n_batch, |n| n as usize);
    if chunk > n_batch {
        return Err(usage(format!("--chunk: {chunk} tokens are more than the batch of {n_batch}; raise --batch")));
    }
    let mut position = 0;
    for tokens in args.tokens.chunks(chunk) {
        let logits = engine.step(&mut states, &Batch::single(0, position, tokens, true))?;
        position += tokens.len();
        for row in logits.chunks(engine.model().n_vocab) {
            let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
            out.write_all(&bytes).with_context(|| format!("cannot write {name}"))?;
        }
    }
    out.flush().with_context(|| format!("cannot write {name}"))
}
