//! `tandem run`: one answer to a prompt, or a chat on a terminal. The text goes to standard output, everything
//! else to standard error.

use super::chat;
use super::generate::{self, Generated, Limits, StopReason};
use super::load::{self, EngineArgs, Loaded, Opened};
use super::{Interrupted, usage};
use crate::engine::Session;
use crate::gguf::Metadata;
use crate::plan::{self, Workload};
use crate::text::{
    ChatTemplate, Message, Part, ReasoningSplitter, RenderOptions, Sampler, SamplerOptions, Tokenizer, Vocabulary,
    sampler,
};
use anyhow::{Context, anyhow};
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Arguments of `tandem run`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tandem run                                          chat with the bundled story model
  tandem run -p \"Tell me a story about a fox.\"        one answer
  tandem run model.gguf -f prompt.txt -n 200 --temp 0  greedy, at most 200 tokens
  tandem run model.gguf --no-template -p \"Once upon\"  plain completion")]
pub struct RunArgs {
    /// Model file (GGUF; of a split set, its first file); without one, the bundled story model
    model: Option<PathBuf>,
    /// Prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// File that holds the prompt
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// System message
    #[arg(long, value_name = "TEXT", env = "TANDEM_SYSTEM")]
    system: Option<String>,
    /// Give the prompt to the model as it is, without the file's chat template
    #[arg(long, env = "TANDEM_NO_TEMPLATE", value_parser = clap::builder::BoolishValueParser::new())]
    no_template: bool,
    /// Let a thinking model think first, where its template knows `enable_thinking`
    #[arg(long, value_name = "on|off", env = "TANDEM_THINK")]
    think: Option<Switch>,
    /// Generate at most N tokens
    #[arg(short = 'n', long, value_name = "N", env = "TANDEM_N_PREDICT", value_parser = clap::value_parser!(u32).range(1..))]
    n_predict: Option<u32>,
    /// One JSON object per token on standard output (text held back to the end comes without an id), then a summary
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Options of the sampler.
#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Temperature; 0 takes the most likely token [default: the file's, else 0.8]
    #[arg(long = "temp", value_name = "T", env = "TANDEM_TEMP", allow_hyphen_values = true)]
    temperature: Option<f32>,
    /// Keep the K most likely tokens; 0: all [default: the file's, else 40]
    #[arg(long, value_name = "K", env = "TANDEM_TOP_K")]
    top_k: Option<usize>,
    /// Keep the most likely tokens whose probabilities sum to P [default: the file's, else 0.95]
    #[arg(long, value_name = "P", env = "TANDEM_TOP_P", allow_hyphen_values = true)]
    top_p: Option<f32>,
    /// Drop tokens less likely than P times the most likely [default: the file's, else 0.05]
    #[arg(long, value_name = "P", env = "TANDEM_MIN_P", allow_hyphen_values = true)]
    min_p: Option<f32>,
    /// Divide the logits of repeated tokens; 1: off
    #[arg(long, value_name = "X", default_value_t = 1.0, env = "TANDEM_REPEAT_PENALTY", allow_hyphen_values = true)]
    repeat_penalty: f32,
    /// Subtract from the logits of tokens that occurred
    #[arg(long, value_name = "X", default_value_t = 0.0, env = "TANDEM_PRESENCE_PENALTY", allow_hyphen_values = true)]
    presence_penalty: f32,
    /// Subtract from the logits of tokens per occurrence
    #[arg(long, value_name = "X", default_value_t = 0.0, env = "TANDEM_FREQUENCY_PENALTY", allow_hyphen_values = true)]
    frequency_penalty: f32,
    /// Tokens that the penalties look back
    #[arg(long, value_name = "N", default_value_t = 64, env = "TANDEM_REPEAT_LAST_N")]
    repeat_last_n: usize,
    /// Seed of the random numbers [default: from the clock]
    #[arg(long, value_name = "N", env = "TANDEM_SEED")]
    seed: Option<u64>,
    /// End before this text, in the reasoning as well as in the answer; may be given several times
    #[arg(long = "stop", value_name = "TEXT")]
    stop: Vec<String>,
}

/// Set by Ctrl-C; a generation ends when it sees it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The first Ctrl-C ends the generation, the second (before the next generation begins) the program.
fn catch_ctrl_c() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")
}

/// The prompt that is not a chat: `-p`, `-f`, or standard input; `None` asks for a chat.
fn prompt(args: &RunArgs) -> anyhow::Result<Option<String>> {
    if let Some(text) = &args.prompt {
        return Ok(Some(text.clone()));
    }
    if let Some(path) = &args.file {
        let bytes = std::fs::read(path).with_context(|| format!("{}: cannot read the prompt", path.display()))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            anyhow::anyhow!("{}: the prompt is not UTF-8 (first bad byte at offset {at})", path.display())
        })?;
        return Ok(Some(text));
    }
    if std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("standard input: cannot read the prompt")?;
    Ok(Some(text))
}

impl SamplingArgs {
    /// Options of the sampler: the user's, else what the file suggests, else the usual ones.
    fn options(&self, metadata: &Metadata) -> anyhow::Result<SamplerOptions> {
        let usual = SamplerOptions::default();
        let suggested = |key: &str| -> anyhow::Result<Option<f32>> {
            Ok(metadata.get::<f64>(&format!("general.sampling.{key}"))?.map(|x| x as f32))
        };
        let clock =
            || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let options = SamplerOptions {
            temperature: self.temperature.or(suggested("temp")?).unwrap_or(usual.temperature),
            top_k: match self.top_k {
                Some(k) => k,
                None => metadata.get::<u32>("general.sampling.top_k")?.map_or(usual.top_k, |k| k as usize),
            },
            top_p: self.top_p.or(suggested("top_p")?).unwrap_or(usual.top_p),
            min_p: self.min_p.or(suggested("min_p")?).unwrap_or(usual.min_p),
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            penalty_window: self.repeat_last_n,
            seed: self.seed.unwrap_or_else(clock),
        };
        sampler::check(&options).map_err(|e| usage(e.to_string()))?;
        Ok(options)
    }
}

/// What turns messages into tokens and logits into text.
struct Voice {
    tokenizer: Tokenizer,
    /// `None` with `--no-template`.
    template: Option<ChatTemplate>,
    sampler: Sampler,
}

impl Voice {
    fn new(args: &RunArgs, opened: &Opened) -> anyhow::Result<Self> {
        let (name, metadata) = (opened.file.name(), opened.file.metadata());
        let sampler = Sampler::new(args.sampling.options(metadata)?)?;
        let tokenizer = Tokenizer::new(Vocabulary::from_metadata(metadata)?)
            .with_context(|| format!("{name}: cannot use its tokenizer"))?;
        if tokenizer.n_vocab() > opened.model.n_vocab {
            let (n, rows) = (tokenizer.n_vocab(), opened.model.n_vocab);
            return Err(anyhow!("{name}: {n} tokens in the vocabulary, but the model has {rows} rows"));
        }
        let template = if args.no_template { None } else { ChatTemplate::from_metadata(metadata, &tokenizer)? };
        if template.is_none() && !args.no_template {
            return Err(anyhow!("{name} has no chat template; use --no-template to continue the prompt as it is"));
        }
        if args.think.is_some() && !template.as_ref().is_some_and(ChatTemplate::knows_thinking) {
            return Err(usage("--think: the chat template of this model knows no enable_thinking"));
        }
        Ok(Self { tokenizer, template, sampler })
    }
}

/// What answers: a session with a voice.
struct Speaker<'a> {
    args: &'a RunArgs,
    /// The file's, for errors.
    name: &'a str,
    session: Session<'a>,
    voice: Voice,
}

impl Speaker<'_> {
    /// Generates what follows `messages` and streams it to standard output.
    fn answer(&mut self, messages: &[Message]) -> anyhow::Result<Generated> {
        let thinking = self.args.think.map(|think| think == Switch::On);
        let prompt = match &self.voice.template {
            Some(template) => {
                let rendered = template.render(messages, &RenderOptions { thinking, ..Default::default() });
                rendered.with_context(|| self.name.to_owned())?
            }
            None => messages.iter().map(|m| m.content.as_str()).collect(),
        };
        let ids = self.voice.tokenizer.encode_prompt(&prompt, self.voice.template.is_some());
        if ids.is_empty() {
            return Err(usage("the prompt is empty"));
        }
        let limits = Limits {
            n_predict: self.args.n_predict.map(|n| n as usize),
            stops: &self.args.sampling.stop,
            interrupted: &|| INTERRUPTED.load(Ordering::SeqCst),
        };
        let mut out = Output::new(self.args.json, &prompt);
        let generated = generate::generate(
            &mut self.session,
            &self.voice.tokenizer,
            &mut self.voice.sampler,
            &ids,
            &limits,
            &mut |id, text| out.token(id, text),
        );
        out.end()?;
        generated
    }
}

/// Standard output: text with the reasoning dimmed on a terminal, or one JSON object per token.
struct Output {
    json: bool,
    dims: bool,
    splitter: ReasoningSplitter,
    styled: String,
    /// Whether there is a line to end.
    begun: bool,
}

impl Output {
    fn new(json: bool, prompt: &str) -> Self {
        let dims = std::io::stdout().is_terminal();
        Self { json, dims, splitter: ReasoningSplitter::new(prompt), styled: String::new(), begun: false }
    }

    fn token(&mut self, id: Option<u32>, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        self.begun = true;
        if self.json {
            writeln!(out, "{}", serde_json::json!({ "id": id, "text": text }))?;
        } else if self.dims {
            self.styled.clear();
            self.splitter.push(text, &mut |part, text| style(part, text, &mut self.styled));
            out.write_all(self.styled.as_bytes())?;
        } else {
            out.write_all(text.as_bytes())?;
        }
        Ok(out.flush()?)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if !self.json && self.begun {
            self.styled.clear();
            self.splitter.finish(&mut |part, text| style(part, text, &mut self.styled));
            writeln!(out, "{}", self.styled)?;
        }
        Ok(out.flush()?)
    }
}

/// Appends `text` to `out`, dimmed if it is reasoning.
fn style(part: Part, text: &str, out: &mut String) {
    match part {
        Part::Reasoning => out.extend(["\x1b[2m", text, "\x1b[0m"]),
        Part::Answer => out.push_str(text),
    }
}

/// Figures of a generation.
#[derive(serde::Serialize)]
struct Summary<'a> {
    stop: StopReason,
    load_s: f64,
    prompt_tokens: usize,
    prompt_tok_s: f64,
    generated_tokens: usize,
    generate_tok_s: f64,
    predicted_generate_tok_s: f64,
    gb_per_s: f64,
    bandwidth_share: f64,
    /// Of mixtures that a GPU shares with the CPU: share of the uses of experts that the GPU had, and the rate that is
    /// predicted where as many of a token's are missing there.
    experts_on_gpu: Option<f64>,
    predicted_for_routing_tok_s: Option<f64>,
    text: &'a str,
}

impl<'a> Summary<'a> {
    /// Of what was generated with `n_past` tokens in the context at the end.
    fn new(generated: &'a Generated, loaded: &Loaded, n_past: usize) -> Self {
        let rate = |n: usize, time: std::time::Duration| if n == 0 { 0.0 } else { n as f64 / time.as_secs_f64() };
        let (model, plan, machine) = (loaded.engine.model(), loaded.engine.plan(), &loaded.machine);
        let generate_tok_s = rate(generated.n_steps, generated.step_time);
        let read_gb_per_s = machine.host.read_gb_per_s(plan.threads);
        Self {
            stop: generated.stop,
            load_s: loaded.load_time.as_secs_f64(),
            prompt_tokens: generated.n_prompt,
            prompt_tok_s: rate(generated.n_prompt, generated.prompt_time),
            generated_tokens: generated.tokens.len(),
            generate_tok_s,
            predicted_generate_tok_s: plan.prediction.generate_tok_s,
            gb_per_s: generate_tok_s * plan::token_bytes(model, plan, n_past) as f64 * 1e-9,
            bandwidth_share: generate_tok_s * plan::token_roof_seconds(model, plan, machine, read_gb_per_s, n_past),
            experts_on_gpu: generated.expert_uses.share(),
            predicted_for_routing_tok_s: loaded.rate_for(&generated.expert_uses, n_past),
            text: &generated.text,
        }
    }
}

/// Says how a generation went: on standard output as JSON, else as a line on standard error.
fn close(args: &RunArgs, generated: &Generated, loaded: &Loaded, session: &Session) -> anyhow::Result<()> {
    let n_past = session.tokens().len();
    let summary = Summary::new(generated, loaded, n_past);
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&summary)?)?;
        return Ok(());
    }
    let ended = match generated.stop {
        StopReason::EndOfText => "",
        StopReason::StopString => " | ended by --stop",
        StopReason::Length => " | ended by -n",
        StopReason::Context => " | the context is full (--ctx)",
        StopReason::Interrupted => " | interrupted",
    };
    let for_routing =
        summary.predicted_for_routing_tok_s.map(|rate| format!(" (for which {rate:.1} tok/s are predicted)"));
    let experts = summary.experts_on_gpu.map(|share| format!(" | experts on the GPU: {:.1} % of uses", 100.0 * share));
    let experts = experts.unwrap_or_default() + &for_routing.unwrap_or_default();
    eprintln!(
        "loaded in {:.2} s | prompt {} tokens, {:.1} tok/s | generated {} tokens, {:.1} tok/s (predicted {:.1}) | {:.1} GB/s, {:.0} % of \
         the bandwidth{experts}{ended}",
        summary.load_s,
        summary.prompt_tokens,
        summary.prompt_tok_s,
        summary.generated_tokens,
        summary.generate_tok_s,
        summary.predicted_generate_tok_s,
        summary.gb_per_s,
        summary.bandwidth_share * 100.0
    );
    eprintln!("{}", load::memory_line(&load::memory(&loaded.engine, session)?));
    Ok(())
}

/// Runs the command.
///
/// # Errors
/// A prompt that cannot be read or does not fit; a model that cannot be opened, planned or loaded; a template that
/// refuses the messages; a failed step; Ctrl-C outside of a chat.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let prompt = prompt(&args)?;
    if prompt.is_none() && args.no_template {
        return Err(usage("--no-template continues a prompt: give one with -p, -f or on standard input"));
    }
    let opened = load::open(args.model.as_deref())?;
    let voice = Voice::new(&args, &opened)?;
    let loaded = load::engine(&opened, &args.engine, Workload::default())?;
    let session = if prompt.is_none() { Session::for_chat(&loaded.engine)? } else { Session::new(&loaded.engine)? };
    let mut speaker = Speaker { args: &args, name: opened.file.name(), session, voice };
    let mut messages: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let Some(prompt) = prompt else {
        let editor = chat::editor()?;
        catch_ctrl_c()?;
        return chat::chat(editor, messages, &|| INTERRUPTED.load(Ordering::SeqCst), &mut |messages| {
            INTERRUPTED.store(false, Ordering::SeqCst);
            let generated = speaker.answer(messages)?;
            close(&args, &generated, &loaded, &speaker.session)?;
            Ok(generated.text)
        });
    };
    catch_ctrl_c()?;
    messages.push(Message::new("user", prompt));
    let generated = speaker.answer(&messages)?;
    close(&args, &generated, &loaded, &speaker.session)?;
    if generated.stop == StopReason::Interrupted { Err(Interrupted.into()) } else { Ok(()) }
}
