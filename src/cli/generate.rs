//! One generation: feed the prompt, sample, stream complete text, stop.

use crate::engine::{Error, ExpertUses, Session};
use crate::text::{Sampler, TextStream, Tokenizer};
use std::time::{Duration, Instant};

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model said so.
    EndOfText,
    /// One of the stop strings.
    StopString,
    /// As many tokens as asked for.
    Length,
    /// No room left in the context.
    Context,
    /// Ctrl-C.
    Interrupted,
}

/// What a generation gave.
#[derive(Debug)]
pub struct Generated {
    /// Tokens, without the one by which the model ended the text.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Prompt tokens that were computed (the others were known from an earlier turn).
    pub n_prompt: usize,
    /// Time until the first token was there.
    pub prompt_time: Duration,
    /// Steps after it, and their time.
    pub n_steps: usize,
    /// Time of those steps.
    pub step_time: Duration,
    /// Uses of experts in those steps.
    pub expert_uses: ExpertUses,
}

/// What bounds a generation.
pub struct Limits<'a> {
    /// Tokens at most; `None`: until the context is full.
    pub n_predict: Option<usize>,
    /// Texts that end it.
    pub stops: &'a [String],
    /// Whether the user asked to stop.
    pub interrupted: &'a dyn Fn() -> bool,
}

/// Continues `prompt` in `session`. `emit` gets every token with the text that it made available: complete
/// UTF-8 that cannot become part of a stop string, possibly none, possibly that of several tokens; at the end, without
/// a token, the text that was held back.
///
/// # Errors
/// A prompt longer than the context, a failed step, logits that are not numbers, what `emit` returns; not an
/// interruption, which is a way to end.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    prompt: &[u32],
    limits: &Limits,
    emit: &mut dyn FnMut(Option<u32>, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Generated> {
    let n_ctx = session.n_ctx();
    let mut prefix = prompt.to_vec();
    let mut stream = TextStream::new(limits.stops.to_vec());
    let (mut text, mut piece) = (String::new(), String::new());
    let (mut n_prompt, mut prompt_time, mut n_steps) = (0, Duration::ZERO, 0);
    let (start, uses) = (Instant::now(), session.expert_uses());
    let stop = 'generation: {
        n_prompt = match session.feed(&prefix, limits.interrupted) {
            Ok(n_new) => n_new,
            Err(Error::Interrupted) => break 'generation StopReason::Interrupted,
            Err(error) => return Err(error.into()),
        };
        let mut id = sampler.sample(session.logits(), &prefix)?;
        prompt_time = start.elapsed();
        loop {
            if tokenizer.ends_generation(id) {
                break StopReason::EndOfText;
            }
            prefix.push(id);
            piece.clear();
            let stopped = stream.push(tokenizer.piece(id, false), &mut piece);
            let stop = if stopped {
                Some(StopReason::StopString)
            } else if limits.n_predict.is_some_and(|n| prefix.len() - prompt.len() >= n) {
                Some(StopReason::Length)
            } else if prefix.len() > n_ctx {
                Some(StopReason::Context)
            } else if (limits.interrupted)() {
                Some(StopReason::Interrupted)
            } else {
                None
            };
            // A GPU computes while the text goes out.
            let started = stop.is_none() && session.start(&prefix, sampler.options())?;
            emit(Some(id), &piece)?;
            text.push_str(&piece);
            if let Some(stop) = stop {
                break stop;
            }
            id = if started {
                session.finish()?
            } else {
                session.feed(&prefix, limits.interrupted)?;
                sampler.sample(session.logits(), &prefix)?
            };
            n_steps += 1;
        }
    };
    let step_time = start.elapsed().saturating_sub(prompt_time);
    let expert_uses = session.expert_uses().since(&uses);
    if stop != StopReason::StopString {
        piece.clear();
        stream.finish(&mut piece);
        if !piece.is_empty() {
            emit(None, &piece)?;
            text.push_str(&piece);
        }
    }
    Ok(Generated {
        tokens: prefix.split_off(prompt.len()),
        text,
        stop,
        n_prompt,
        prompt_time,
        n_steps,
        step_time,
        expert_uses,
    })
}
