//! Runs the same GGUF through llama.cpp and through tandem, in one process, alternating, with the same
//! threads and the same tokens, and prints the rates of both, their ratios, and how far the logits differ.
//!
//! A package of its own, since it builds llama.cpp (some minutes): it needs cmake, a C++ compiler and
//! libclang (`apt install cmake g++ clang libclang-dev`). Run it in its folder, whose `.cargo/config.toml`
//! gives llama.cpp every instruction of this processor:
//!
//!     cd benches/peer && cargo run --release -- model.gguf --md

mod llama;
mod ours;

use anyhow::{Result, ensure};
use clap::Parser;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Compare tandem with llama.cpp on one model.
#[derive(Parser)]
struct Options {
    /// GGUF file.
    model: PathBuf,
    /// Threads of both [default: the cores of this machine].
    #[arg(long)]
    threads: Option<usize>,
    /// Rounds; each runs both engines, in alternating order.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Prompt tokens of the prompt test; 0 leaves it out, and rounds then continue one sequence, whose first tokens are
    /// read once.
    #[arg(short, long, default_value_t = 512)]
    prompt: usize,
    /// Tokens of the generation test.
    #[arg(short = 'n', long, default_value_t = 32)]
    generate: usize,
    /// Tokens already in the context before either test.
    #[arg(short, long, default_value_t = 0)]
    depth: usize,
    /// Most tokens in one batch.
    #[arg(long, default_value_t = 512)]
    batch: usize,
    /// llama.cpp multiplies the blocks of the file, which it otherwise repacks: its best may be either.
    #[arg(long)]
    no_repack: bool,
    /// Print the table as Markdown rows.
    #[arg(long)]
    md: bool,
}

/// One engine under test: one sequence that is fed tokens.
trait Runner {
    /// Forgets the sequence.
    fn clear(&mut self) -> Result<()>;

    /// Appends `tokens` to the sequence and leaves the logits of the last one in `logits` `[n_vocab]`.
    fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()>;

    /// Entries of the vocabulary.
    fn n_vocab(&self) -> usize;
}

/// What one engine did in one round.
struct Round {
    /// Prompt tokens a second.
    prompt: f64,
    /// Generated tokens a second.
    generate: f64,
    /// Logits at the end of the prompt, then after each generated token.
    logits: Vec<Vec<f32>>,
}

/// A new sequence with the tokens before the generation test.
fn begin(runner: &mut dyn Runner, options: &Options, tokens: &[u32]) -> Result<()> {
    runner.clear()?;
    runner.feed(&tokens[..options.depth + 1], &mut Vec::new())
}

/// The tests of one round for one engine.
fn round(runner: &mut dyn Runner, options: &Options, tokens: &[u32]) -> Result<Round> {
    // Spinning worker threads of the engine that ran before get time to fall asleep.
    std::thread::sleep(Duration::from_millis(300));
    let (depth, rest) = tokens.split_at(options.depth);
    let mut logits = Vec::new();
    let mut prompt = f64::NAN;
    if options.prompt > 0 {
        logits.push(Vec::new());
        runner.clear()?;
        if !depth.is_empty() {
            runner.feed(depth, &mut logits[0])?;
        }
        let start = Instant::now();
        runner.feed(&rest[..options.prompt], &mut logits[0])?;
        prompt = options.prompt as f64 / start.elapsed().as_secs_f64();
        begin(runner, options, tokens)?;
    }
    let start = Instant::now();
    for token in &rest[1..options.generate + 1] {
        let mut row = Vec::new();
        runner.feed(&[*token], &mut row)?;
        logits.push(row);
    }
    let generate = options.generate as f64 / start.elapsed().as_secs_f64();
    Ok(Round { prompt, generate, logits })
}

/// Least, median and greatest.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.repeats > 0 && options.generate > 0, "nothing to measure");
    let threads = match options.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    let n_tokens = options.depth + 1 + options.prompt.max(options.generate);
    let n_generated = if options.prompt == 0 { (options.repeats + 1) * options.generate } else { 0 };
    let n_ctx = (n_tokens + n_generated).next_multiple_of(256);

    let mut llama = llama::Llama::open(&options.model, n_ctx, options.batch, threads, !options.no_repack)?;
    let mut ours = ours::Ours::open(&options.model, n_ctx, options.batch, threads)?;
    let n_vocab = llama.n_vocab();
    ensure!(ours.n_vocab() == n_vocab, "vocabularies of {} and {n_vocab} tokens", ours.n_vocab());
    // A linear congruential walk over the vocabulary: any tokens do, if both get the same.
    let tokens: Vec<u32> =
        (0..n_tokens as u64).map(|i| ((i * 2_654_435_761 + 12345) % n_vocab as u64) as u32).collect();

    eprintln!("llama.cpp: {}", llama::Llama::build());
    eprintln!("tandem: {}", ours.build());
    let mut rounds: [Vec<Round>; 2] = [Vec::new(), Vec::new()];
    if options.prompt == 0 {
        let runners: [&mut dyn Runner; 2] = [&mut llama, &mut ours];
        runners.into_iter().try_for_each(|runner| begin(runner, &options, &tokens))?;
    }
    for repeat in 0..=options.repeats {
        let runners: [&mut dyn Runner; 2] = [&mut llama, &mut ours];
        for (which, runner) in runners.into_iter().enumerate() {
            let round = round(runner, &options, &tokens)?;
            eprintln!(
                "round {repeat} {}: prompt {:.1}, generation {:.2} tokens/s{}",
                ["llama.cpp", "tandem"][which],
                round.prompt,
                round.generate,
                if repeat == 0 { " (warm-up, not counted)" } else { "" }
            );
            if repeat > 0 {
                rounds[which].push(round);
            }
        }
    }
    print_table(&options, threads, &rounds);
    Ok(())
}

fn print_table(options: &Options, threads: usize, [theirs, ours]: &[Vec<Round>; 2]) {
    let name = options.model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    if options.md {
        println!("| model | threads | test | llama.cpp tokens/s | tandem tokens/s | ratio |");
        println!("| --- | --- | --- | --- | --- | --- |");
    }
    type Rate = fn(&Round) -> f64;
    let depth = if options.depth > 0 { format!(" at {}", options.depth) } else { String::new() };
    let tests: [(String, Rate); 2] = [
        (format!("pp{}{depth}", options.prompt), |r| r.prompt),
        (format!("tg{}{depth}", options.generate), |r| r.generate),
    ];
    for (test, rate) in tests.into_iter().skip(usize::from(options.prompt == 0)) {
        let show = |rounds: &[Round]| {
            let [least, median, greatest] = spread(rounds.iter().map(rate));
            format!("{median:.2} ({least:.2} to {greatest:.2})")
        };
        // Ratios are of rounds that ran back to back, so that a slow spell of the machine meets both.
        let [least, median, greatest] = spread(theirs.iter().zip(ours).map(|(t, o)| rate(o) / rate(t)));
        let ratio = format!("{median:.2} ({least:.2} to {greatest:.2})");
        if options.md {
            println!("| {name} | {threads} | {test} | {} | {} | {ratio} |", show(theirs), show(ours));
        } else {
            let (theirs, ours) = (show(theirs), show(ours));
            println!("{name}, {threads} threads, {test}: llama.cpp {theirs}, tandem {ours}, ratio {ratio}");
        }
    }
    let (mut difference, mut squares, mut norm) = (0f64, 0f64, 0f64);
    let (mut n_agree, mut n_rows) = (0, 0);
    for (t, o) in theirs[0].logits.iter().zip(&ours[0].logits) {
        for (t, o) in t.iter().zip(o) {
            let (t, o) = (f64::from(*t), f64::from(*o));
            // NaN compares false: `max` would hide it.
            difference = if (t - o).abs() <= difference { difference } else { (t - o).abs() };
            squares += (t - o) * (t - o);
            norm += t * t;
        }
        let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
        n_agree += usize::from(best(t) == best(o));
        n_rows += 1;
    }
    println!(
        "\nlogits of {n_rows} positions: largest difference {difference:.4}, relative rms {:.4}, same best token at {n_agree}",
        (squares / norm).sqrt()
    );
}
