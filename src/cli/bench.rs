//! `tandem bench`: prompt and generation rates at given lengths and depths, against what the machine can read.

use super::load::{self, EngineArgs, Loaded, Memory};
use super::usage;
use crate::engine::Session;
use crate::plan::{self, Workload};
use crate::text::SamplerOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Arguments of `tandem bench`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tandem bench model.gguf\n  tandem bench model.gguf -p 512,2048 -n 128 -d 0,4096 -r 5 --md"
)]
pub struct BenchArgs {
    /// Model file (GGUF); without one, the bundled story model
    model: Option<PathBuf>,
    /// Prompt lengths, separated by commas; 0 for none
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512", value_name = "TOKENS")]
    prompt: Vec<u32>,
    /// Generated lengths, separated by commas; 0 for none
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128", value_name = "TOKENS")]
    generate: Vec<u32>,
    /// Tokens already in the context, separated by commas
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0", value_name = "TOKENS")]
    depth: Vec<u32>,
    /// Repetitions of each row
    #[arg(short = 'r', long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// One JSON object with every row and every repetition
    #[arg(long, conflicts_with = "md")]
    json: bool,
    /// A Markdown table
    #[arg(long)]
    md: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One line of the table: a length at a depth, and the rate of every repetition in tokens per second.
#[derive(serde::Serialize)]
struct Row {
    test: String,
    depth: usize,
    tokens: usize,
    rates: Vec<f64>,
    median: f64,
    /// What the plan predicts; none for prompts at a depth.
    predicted: Option<f64>,
    /// What generation reads from memory.
    read: Option<Read>,
    /// Share of the generation's time in which the GPU was at work, by its own clock.
    gpu_busy: Option<f64>,
}

/// Bytes that one generated token moves, the rate that this makes, and its share of the measured bandwidth.
#[derive(serde::Serialize)]
struct Read {
    bytes_per_token: u64,
    gb_per_s: f64,
    share: f64,
}

/// Median of `values`, which must not be empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0 }
}

/// Tokens that no tokenizer chose: speeds do not depend on them, expert routing should see many.
fn noise_tokens(n: usize, n_vocab: usize) -> Vec<u32> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % n_vocab as u64) as u32
        })
        .collect()
}

/// Seconds of `tokens` prompt tokens, in the plan's batches, after `depth` tokens that are not timed.
fn time_prompt(session: &mut Session, depth: &[u32], tokens: &[u32]) -> anyhow::Result<f64> {
    session.clear();
    if !depth.is_empty() {
        session.feed(depth, &|| false)?;
    }
    let whole: Vec<u32> = depth.iter().chain(tokens).copied().collect();
    let start = Instant::now();
    let n_new = session.feed(&whole, &|| false)?;
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(n_new, tokens.len(), "a timed prompt computes all its tokens and no others");
    Ok(seconds)
}

/// Seconds of `n` single-token steps after `depth` tokens (and one) that are not timed, and how many of them the
/// GPU was at work where it chooses the tokens itself; elsewhere tokens are given and none is chosen.
fn time_generation(
    session: &mut Session,
    depth: &[u32],
    n: usize,
    n_vocab: usize,
) -> anyhow::Result<(f64, Option<f64>)> {
    let mut tokens = depth.to_vec();
    tokens.push(0);
    session.feed(&tokens, &|| false)?;
    let options = SamplerOptions::default();
    tokens.push(0);
    if session.start(&tokens, &options)? {
        tokens.push(session.finish()?);
        let (busy, start) = (session.busy_seconds()?, Instant::now());
        for _ in 0..n {
            session.start(&tokens, &options)?;
            tokens.push(session.finish()?);
        }
        return Ok((start.elapsed().as_secs_f64(), Some(session.busy_seconds()? - busy)));
    }
    tokens.pop();
    let next = noise_tokens(n, n_vocab);
    let start = Instant::now();
    for token in next {
        tokens.push(token);
        session.feed(&tokens, &|| false)?;
    }
    Ok((start.elapsed().as_secs_f64(), None))
}

/// Runs the table.
///
/// # Errors
/// A model that cannot be opened, planned or loaded, or lengths that memory does not allow.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let longest = |lengths: &[u32]| lengths.iter().max().map_or(0, |n| *n as usize);
    // Two more positions than the longest row: a generation begins with two tokens that are not timed.
    let prompt = longest(&args.depth) + longest(&args.prompt).max(2);
    let workload = Workload { prompt, generate: longest(&args.generate) };
    let opened = load::open(args.model.as_deref())?;
    let loaded = load::engine(&opened, &args.engine, workload)?;
    let n_vocab = opened.model.n_vocab;
    let mut session = Session::new(&loaded.engine)?;
    let mut rows = Vec::new();
    let (needed, n_ctx) = (prompt + workload.generate, loaded.engine.plan().n_ctx);
    if needed > n_ctx {
        return Err(usage(format!("the longest row needs {needed} positions, the context has {n_ctx}; raise --ctx")));
    }
    for depth in args.depth.iter().map(|n| *n as usize) {
        let tokens = noise_tokens(depth + longest(&args.prompt), n_vocab);
        let (prefix, rest) = tokens.split_at(depth);
        for n in args.prompt.iter().map(|n| *n as usize).filter(|n| *n > 0) {
            let mut rates = Vec::new();
            for i in 0..=args.repeat {
                let seconds = time_prompt(&mut session, prefix, &rest[..n])?;
                if i > 0 {
                    rates.push(n as f64 / seconds); // the first run warms up
                }
            }
            rows.push(Row::new(&loaded, "pp", n, depth, rates));
        }
        for n in args.generate.iter().map(|n| *n as usize).filter(|n| *n > 0) {
            let (mut rates, mut shares) = (Vec::new(), Vec::new());
            for i in 0..=args.repeat {
                let (seconds, busy) = time_generation(&mut session, prefix, n, n_vocab)?;
                if i > 0 {
                    rates.push(n as f64 / seconds);
                    shares.extend(busy.map(|busy| busy / seconds));
                }
            }
            let gpu_busy = if shares.is_empty() { None } else { Some(median(&shares)) };
            rows.push(Row { gpu_busy, ..Row::new(&loaded, "tg", n, depth, rates) });
        }
    }
    let memory = load::memory(&loaded.engine, &session)?;
    report(&args, &loaded, &rows, &memory)
}

impl Row {
    fn new(loaded: &Loaded, kind: &str, n: usize, depth: usize, rates: Vec<f64>) -> Self {
        let engine = &loaded.engine;
        let median = median(&rates);
        let test = format!("{kind}{n}");
        let rates_at = |depth| engine.plan().rates_at(engine.model(), &loaded.machine, depth);
        if kind == "pp" {
            let predicted = rates_at(n).map(|r| r.1).filter(|_| depth == 0);
            return Self { test, depth, tokens: n, rates, median, predicted, read: None, gpu_busy: None };
        }
        let bytes_per_token = plan::token_bytes(engine.model(), engine.plan(), depth + n / 2);
        let gb_per_s = bytes_per_token as f64 * median * 1e-9;
        let share = median * plan::token_roof_seconds(engine.model(), engine.plan(), &loaded.machine, depth + n / 2);
        let read = Some(Read { bytes_per_token, gb_per_s, share });
        let predicted = rates_at(depth + n / 2).map(|r| r.0);
        Self { test, depth, tokens: n, rates, median, predicted, read, gpu_busy: None }
    }

    /// Lowest and highest rate.
    fn spread(&self) -> (f64, f64) {
        self.rates.iter().fold((f64::INFINITY, 0.0), |(low, high), &r| (low.min(r), high.max(r)))
    }
}

/// Most memory that this process has held, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn report(args: &BenchArgs, loaded: &Loaded, rows: &[Row], memory: &[Memory]) -> anyhow::Result<()> {
    let (engine, host) = (&loaded.engine, &loaded.machine.host);
    let (plan, peak) = (engine.plan(), peak_memory());
    if args.json {
        let object = serde_json::json!({
            "model": plan.model,
            "machine": host,
            "build": *super::VERSION,
            "threads": plan.threads,
            "kv_dtype": plan.kv_dtype,
            "n_batch": plan.n_batch,
            "load_s": loaded.load_time.as_secs_f64(),
            "peak_memory_bytes": peak,
            "memory": memory,
            "rows": rows,
        });
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&object)?)?;
        return Ok(());
    }
    let header = ["test", "depth", "tok/s", "min", "max", "predicted", "MB/token", "GB/s", "of bandwidth", "GPU busy"];
    let cells: Vec<[String; 10]> = rows
        .iter()
        .map(|row| {
            let (low, high) = row.spread();
            let read = |f: &dyn Fn(&Read) -> String| row.read.as_ref().map_or(String::new(), f);
            [
                row.test.clone(),
                row.depth.to_string(),
                format!("{:.2}", row.median),
                format!("{low:.2}"),
                format!("{high:.2}"),
                row.predicted.map_or(String::new(), |p| format!("{p:.2}")),
                read(&|r| format!("{:.1}", r.bytes_per_token as f64 / 1e6)),
                read(&|r| format!("{:.1}", r.gb_per_s)),
                read(&|r| format!("{:.0} %", r.share * 100.0)),
                row.gpu_busy.map_or(String::new(), |share| format!("{:.1} %", share * 100.0)),
            ]
        })
        .collect();
    let widths: Vec<usize> =
        (0..header.len()).map(|i| cells.iter().map(|c| c[i].len()).max().unwrap_or(0).max(header[i].len())).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, w)| format!("{c:>w$}")).collect();
        if args.md { format!("| {} |", padded.join(" | ")) } else { padded.join("  ") }
    };
    let mut out = vec![line(&header.map(String::from))];
    if args.md {
        out.push(line(&widths.iter().map(|w| "-".repeat(*w - 1) + ":").collect::<Vec<_>>()));
    }
    out.extend(cells.iter().map(|c| line(c)));
    writeln!(std::io::stdout(), "{}\n", plan.model)?;
    writeln!(std::io::stdout(), "{}\n", out.join("\n"))?;
    let peak = peak.map_or(String::new(), |b| format!(", peak memory {:.2} GiB", b as f64 / (1u64 << 30) as f64));
    writeln!(
        std::io::stdout(),
        "{} | {} threads, {} reading {:.1} GB/s | loaded in {:.2} s{peak} | {}",
        host.cpu,
        plan.threads,
        host.isa.name(),
        host.read_gb_per_s(plan.threads),
        loaded.load_time.as_secs_f64(),
        *super::VERSION
    )?;
    writeln!(std::io::stdout(), "{}", load::memory_line(memory))?;
    Ok(())
}
