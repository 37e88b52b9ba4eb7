//! `tandem bench`: prompt and generation rates at given lengths and depths, against what the machine can read.

use super::load::{self, EngineArgs, Loaded, Memory};
use super::timeline::{self, Format};
use super::usage;
use crate::engine::{Session, StepTrace, handoff_cost};
use crate::plan::{self, Workload};
use crate::text::SamplerOptions;
use anyhow::Context;
use std::io::Write;
use std::path::{Path, PathBuf};
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
    /// Draw one step of a GPU and the CPU together: what each does when, and their hand-overs (.svg or .html)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One line of the table: a length at a depth, and the rate of every repetition in tokens per second.
#[derive(Default, serde::Serialize)]
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
    /// Microseconds that a hand-over between the GPU and the CPU cost in the last step, beside what both computed
    /// meanwhile: the median, and how many there were.
    handoff: Option<(f64, usize)>,
    /// Of mixtures that a GPU shares with the CPU: share of the uses of experts that the GPU had.
    experts_on_gpu: Option<f64>,
    /// What the plan predicts where as many experts of a token are missing on the GPU as here.
    predicted_for_routing: Option<f64>,
}

/// Bytes that one generated token moves, the rate that this makes, and its share of the bandwidth: of each repetition
/// against what a plain loop read of the same weights right after it, since others on the machine change that from
/// second to second; the median. Against the bandwidth that the plan was made with where the facts are of another
/// machine, and where the CPU has no weights. The loop takes other experts each time, a text some of them again;
/// weights that a cache holds are read from there by both.
#[derive(serde::Serialize)]
struct Read {
    bytes_per_token: u64,
    gb_per_s: f64,
    share: f64,
    /// Of the loop, after each repetition.
    weights_gb_per_s: Vec<f64>,
}

/// How long a plain loop reads the weights after each repetition of a generation.
const READ_SECONDS: f64 = 0.3;

/// Steps of which one is drawn.
const TRACED_STEPS: usize = 15;

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
pub fn run(mut args: BenchArgs) -> anyhow::Result<()> {
    args.engine.measure_now = true;
    let longest = |lengths: &[u32]| lengths.iter().max().map_or(0, |n| *n as usize);
    // Two more positions than the longest row: a generation begins with two tokens that are not timed.
    let prompt = longest(&args.depth) + longest(&args.prompt).max(2);
    let workload = Workload { prompt, generate: longest(&args.generate) };
    let opened = load::open(args.model.as_deref())?;
    let trace = args.trace.as_deref().map(open_trace).transpose()?;
    let loaded = load::engine(&opened, &args.engine, workload)?;
    if args.trace.is_some() && !loaded.engine.can_trace() {
        return Err(usage(
            "--trace shows a step in which a GPU and the CPU hand work to each other, and in this plan one GPU \
            does not share any with the CPU; --vram or --place 'blk.*.ffn=cuda0:50%' make such plans",
        ));
    }
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
            let (mut rates, mut shares, mut uses) = (Vec::new(), Vec::new(), session.expert_uses());
            let mut weights_gb_per_s = Vec::new();
            for i in 0..=args.repeat {
                let (seconds, busy) = time_generation(&mut session, prefix, n, n_vocab)?;
                if i == 0 {
                    uses = session.expert_uses();
                } else {
                    rates.push(n as f64 / seconds);
                    shares.extend(busy.map(|busy| busy / seconds));
                    let reads = args.engine.measures_now().then(|| loaded.engine.read_gb_per_s(READ_SECONDS));
                    weights_gb_per_s.extend(reads.flatten());
                }
            }
            let gpu_busy = if shares.is_empty() { None } else { Some(median(&shares)) };
            let hand_overs = session.hand_overs();
            let answered = hand_overs.iter().filter(|t| t.taken >= t.given); // not the head's
            let costs: Vec<f64> = answered.map(handoff_cost).collect();
            let handoff = if costs.is_empty() { None } else { Some((median(&costs), costs.len())) };
            let uses = session.expert_uses().since(&uses);
            let (experts_on_gpu, predicted_for_routing) = (uses.share(), loaded.rate_for(&uses, depth + n / 2));
            let row = Row::new(&loaded, "tg", n, depth, rates).with_read(&loaded, weights_gb_per_s);
            rows.push(Row { gpu_busy, handoff, experts_on_gpu, predicted_for_routing, ..row });
        }
    }
    let memory = load::memory(&loaded.engine, &session)?;
    report(&args, &loaded, &rows, &memory)?;
    if let Some((mut file, format)) = trace {
        let step = median_step(&mut session, &noise_tokens(prompt - 1, n_vocab))?;
        let (title, notes) =
            (format!("{}: one token", loaded.engine.plan().model), trace_notes(&loaded, &step, prompt));
        let picture = match format {
            Format::Svg => timeline::svg(&step, &title, &notes),
            Format::Html => timeline::html(&step, &title, &notes),
        };
        file.write_all(picture.as_bytes()).context("cannot write the trace")?;
        let figures: Vec<String> = timeline::figures(&step).iter().map(|(what, n)| format!("{what} {n}")).collect();
        eprintln!("trace: {}", figures.join(" | "));
    }
    Ok(())
}

/// The file that a trace goes to, and as what.
fn open_trace(path: &Path) -> anyhow::Result<(std::fs::File, Format)> {
    let format = Format::of(path).map_err(usage)?;
    let file = std::fs::File::create(path).with_context(|| format!("{}: cannot write a trace here", path.display()))?;
    Ok((file, format))
}

/// Of some steps after `depth` the one that took the median time.
fn median_step(session: &mut Session, depth: &[u32]) -> anyhow::Result<StepTrace> {
    let (mut tokens, options, mut steps) = (depth.to_vec(), SamplerOptions::default(), Vec::new());
    session.clear();
    session.feed(&tokens, &|| false)?;
    tokens.push(0);
    while steps.len() < TRACED_STEPS && tokens.len() < session.n_ctx() {
        let busy = session.busy_seconds()?;
        let next = if session.start(&tokens, &options)? {
            session.finish()?
        } else {
            session.feed(&tokens, &|| false)?;
            0
        };
        tokens.push(next);
        steps.extend(session.trace(busy)?);
    }
    steps.sort_by(|a, b| a.step.total_cmp(&b.step));
    anyhow::ensure!(
        !steps.is_empty(),
        "no step to trace: the context has no room for one (raise --ctx), or one has more than 1024 hand-overs"
    );
    Ok(steps.swap_remove(steps.len() / 2))
}

/// The small print of a trace.
fn trace_notes(loaded: &Loaded, step: &StepTrace, depth: usize) -> Vec<String> {
    let (plan, host) = (loaded.engine.plan(), &loaded.machine.host);
    let gpus: Vec<&str> =
        plan.limits.iter().filter(|l| l.device != plan::Device::Cpu).map(|l| l.name.as_str()).collect();
    vec![
        format!(
            "{}, {}, {} threads; after {depth} tokens; {}",
            gpus.join(", "),
            host.cpu,
            plan.threads,
            *super::VERSION
        ),
        format!(
            "Milliseconds after the GPU's first kernel, each side by its own clock; the two agree within {:.1} µs. A hand-over costs what it takes beyond the longer of both shares.",
            step.clock_error
        ),
    ]
}

impl Row {
    fn new(loaded: &Loaded, kind: &str, n: usize, depth: usize, rates: Vec<f64>) -> Self {
        let engine = &loaded.engine;
        let median = median(&rates);
        let test = format!("{kind}{n}");
        let rates_at = |depth| engine.plan().rates_at(engine.model(), &loaded.machine, depth, None);
        let row = Self { test, depth, tokens: n, rates, median, ..Self::default() };
        if kind == "pp" {
            return Self { predicted: rates_at(n).map(|r| r.1).filter(|_| depth == 0), ..row };
        }
        Self { predicted: rates_at(depth + n / 2).map(|r| r.0), ..row }
    }

    /// A generation's, with what it reads.
    fn with_read(self, loaded: &Loaded, weights_gb_per_s: Vec<f64>) -> Self {
        let (model, plan, machine) = (loaded.engine.model(), loaded.engine.plan(), &loaded.machine);
        let n_past = self.depth + self.tokens / 2;
        let share = |rate: f64, read: f64| rate * plan::token_roof_seconds(model, plan, machine, read, n_past);
        let mut shares: Vec<f64> = self.rates.iter().zip(&weights_gb_per_s).map(|(&r, &read)| share(r, read)).collect();
        if shares.is_empty() {
            shares.push(share(self.median, machine.host.read_gb_per_s(plan.threads)));
        }
        let bytes_per_token = plan::token_bytes(model, plan, n_past);
        let gb_per_s = bytes_per_token as f64 * self.median * 1e-9;
        Self { read: Some(Read { bytes_per_token, gb_per_s, share: median(&shares), weights_gb_per_s }), ..self }
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
    let (plan, peak, reading) = (engine.plan(), peak_memory(), host.read_gb_per_s(engine.plan().threads));
    if args.json {
        let object = serde_json::json!({
            "model": plan.model,
            "machine": host,
            "build": *super::VERSION,
            "threads": plan.threads,
            "reading_gb_per_s": reading,
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
    for row in rows {
        if let Some((us, n)) = row.handoff {
            writeln!(std::io::stdout(), "{}: {n} hand-offs a token, {us:.1} us each", row.test)?;
        }
    }
    for row in rows {
        if let Some(share) = row.experts_on_gpu {
            let predicted = row.predicted_for_routing.map(|rate| format!(", for which {rate:.2} tok/s are predicted"));
            let predicted = predicted.unwrap_or_default();
            writeln!(std::io::stdout(), "{}: experts on the GPU: {:.1} % of uses{predicted}", row.test, 100.0 * share)?;
        }
    }
    let weights: Vec<f64> =
        rows.iter().filter_map(|r| r.read.as_ref()).flat_map(|r| &r.weights_gb_per_s).copied().collect();
    let weights = if weights.is_empty() { String::new() } else { format!(", the weights {:.1}", median(&weights)) };
    let peak = peak.map_or(String::new(), |b| format!(", peak memory {:.2} GiB", b as f64 / (1u64 << 30) as f64));
    writeln!(
        std::io::stdout(),
        "{} | {} threads, {} reading {:.1} GB/s{weights} | loaded in {:.2} s{peak} | {}",
        host.cpu,
        plan.threads,
        host.isa.name(),
        reading,
        loaded.load_time.as_secs_f64(),
        *super::VERSION
    )?;
    writeln!(std::io::stdout(), "{}", load::memory_line(memory))?;
    Ok(())
}
