//! The sampler: from the logits of one position to the next token. Stages in order: penalties, top-k, top-p,
//! min-p, temperature, draw. Top-p and min-p look at probabilities before the temperature, as users of
//! llama.cpp expect. The same seed, options and logits give the same tokens everywhere; after the first few
//! tokens nothing is allocated.

use std::cmp::Ordering;
use std::collections::VecDeque;

use super::Error;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SamplerOptions {
    /// Divides the logits before the draw; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the highest probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of recent tokens and multiplies negative ones; 1 is none.
    pub repeat_penalty: f32,
    /// Subtracted from the logit of a recent token; 0 is none.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a recent token once for each time it occurs; 0 is none.
    pub frequency_penalty: f32,
    /// How many of the last tokens count as recent.
    pub penalty_window: usize,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplerOptions {
    /// Temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no penalties, a window of 64, seed 0.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Most likely token, no penalties.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Says which option is out of range.
    ///
    /// # Errors
    /// Names the option, its range and the value.
    pub fn check(&self) -> Result<(), Error> {
        let check = |good: bool, option, expected, found: f32| {
            if good { Ok(()) } else { Err(Error::Option { option, expected, found: found.to_string() }) }
        };
        let Self { temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, .. } = *self;
        check(temperature.is_finite() && temperature >= 0.0, "temperature", "a number of at least 0", temperature)?;
        check(top_p > 0.0 && top_p <= 1.0, "top-p", "a number above 0 and at most 1", top_p)?;
        check((0.0..=1.0).contains(&min_p), "min-p", "a number from 0 to 1", min_p)?;
        let positive = repeat_penalty.is_finite() && repeat_penalty > 0.0;
        check(positive, "repeat penalty", "a number above 0", repeat_penalty)?;
        check(presence_penalty.is_finite(), "presence penalty", "a number", presence_penalty)?;
        check(frequency_penalty.is_finite(), "frequency penalty", "a number", frequency_penalty)
    }

    fn penalises(&self) -> bool {
        self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// A token that may still be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    id: u32,
}

impl Candidate {
    /// The more likely first; the lower id first among equals, so that the order is the same everywhere.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

/// Chooses tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    random: u64,
    recent: VecDeque<u32>,      // the last `penalty_window` tokens
    sorted: Vec<u32>,           // `recent` in order, to count it
    candidates: Vec<Candidate>, // most likely first once selected
    weights: Vec<f64>,          // not normalised, by candidate
}

impl Sampler {
    /// A sampler that has seen no tokens.
    ///
    /// # Errors
    /// See [`SamplerOptions::check`].
    pub fn new(options: SamplerOptions) -> Result<Self, Error> {
        options.check()?;
        Ok(Self {
            random: options.seed,
            options,
            recent: VecDeque::new(),
            sorted: Vec::new(),
            candidates: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// Notes a token of the sequence (of the prompt, or one that was sampled) for the penalties.
    pub fn accept(&mut self, token: u32) {
        if self.options.penalty_window == 0 || !self.options.penalises() {
            return;
        }
        if self.recent.len() == self.options.penalty_window {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// The next token. `logits` `[n_vocab]` are changed by the penalties.
    ///
    /// # Errors
    /// A logit that is NaN or infinitely large, or no logit that is a number: the computation before is wrong.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32, Error> {
        self.penalise(logits);
        let best = most_likely(logits)?;
        if self.options.temperature == 0.0 {
            return Ok(best.id);
        }
        self.select(logits, best.logit);
        let scale = f64::from(self.options.temperature);
        self.weights.extend(self.candidates.iter().map(|c| (f64::from(c.logit - best.logit) / scale).exp()));
        let mut at = self.uniform() * self.weights.iter().sum::<f64>();
        for (candidate, weight) in self.candidates.iter().zip(&self.weights) {
            at -= weight;
            if at < 0.0 {
                return Ok(candidate.id);
            }
        }
        // Rounding left a rest behind the last candidate.
        Ok(self.candidates.last().unwrap_or(&best).id)
    }

    fn penalise(&mut self, logits: &mut [f32]) {
        self.sorted.clear();
        self.sorted.extend(&self.recent);
        self.sorted.sort_unstable();
        let SamplerOptions { repeat_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for run in self.sorted.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(run[0] as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repeat_penalty } else { *logit * repeat_penalty };
            *logit -= presence_penalty + frequency_penalty * run.len() as f32;
        }
    }

    /// Top-k, top-p and min-p: leaves the tokens to draw from in `candidates`, most likely first.
    fn select(&mut self, logits: &[f32], best: f32) {
        let SamplerOptions { top_k, top_p, min_p, .. } = self.options;
        let weight = |logit: f32| f64::from(logit - best).exp();
        let k = if top_k == 0 { logits.len() } else { top_k.min(logits.len()) };
        self.weights.clear();
        self.weights.reserve(k);
        if k < logits.len() {
            most_likely_k(logits, k, &mut self.candidates);
        } else {
            self.candidates.clear();
            self.candidates.extend(logits.iter().zip(0..).map(|(&logit, id)| Candidate { logit, id }));
        }
        if top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(|c| weight(c.logit)).sum();
            let wanted = total * f64::from(top_p);
            // Few tokens hold most of the probability: sort the head of the list, and more of it only if needed.
            let (mut sorted, mut sum) = (0, 0.0);
            let keep = 'head: loop {
                let head = (sorted * 4).max(256).min(self.candidates.len());
                if head < self.candidates.len() {
                    self.candidates[sorted..].select_nth_unstable_by(head - sorted, Candidate::order);
                }
                self.candidates[sorted..head].sort_unstable_by(Candidate::order);
                for (i, candidate) in self.candidates[sorted..head].iter().enumerate() {
                    sum += weight(candidate.logit);
                    if sum >= wanted {
                        break 'head sorted + i + 1;
                    }
                }
                sorted = head;
                if sorted == self.candidates.len() {
                    break sorted;
                }
            };
            self.candidates.truncate(keep);
        }
        if min_p > 0.0 {
            self.candidates.retain(|c| weight(c.logit) >= f64::from(min_p));
        }
    }

    /// A number in [0, 1). SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The token with the highest logit, the first one among equals.
fn most_likely(logits: &[f32]) -> Result<Candidate, Error> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
    for (&logit, id) in logits.iter().zip(0..) {
        if logit.is_nan() {
            return Err(Error::Logits { id, found: logit });
        }
        if logit > best.logit {
            best = Candidate { logit, id };
        }
    }
    if best.logit.is_finite() { Ok(best) } else { Err(Error::Logits { id: best.id, found: best.logit }) }
}

/// The `k` most likely tokens into `kept`, most likely first, in one pass that collects what beats the k-th
/// best so far.
fn most_likely_k(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    kept.clear();
    kept.reserve(2 * k);
    let mut bar = f32::NEG_INFINITY;
    for (&logit, id) in logits.iter().zip(0..) {
        // An equal logit loses to the lower ids that were seen before.
        if logit > bar || kept.len() < k {
            kept.push(Candidate { logit, id });
            if kept.len() == 2 * k {
                kept.select_nth_unstable_by(k - 1, Candidate::order);
                kept.truncate(k);
                bar = kept[k - 1].logit;
            }
        }
    }
    kept.sort_unstable_by(Candidate::order);
    kept.truncate(k);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeded logits of about the spread that models have.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut sampler = Sampler::new(SamplerOptions { seed, ..Default::default() }).unwrap();
        (0..n).map(|_| (0..6).map(|_| sampler.uniform() as f32).sum::<f32>() * 8.0 - 24.0).collect()
    }

    /// The stages written as plainly as possible: full sorts, full sums. Token ids and probabilities, most likely first.
    fn plain(options: &SamplerOptions, logits: &[f32], recent: &[u32]) -> Vec<(u32, f64)> {
        let mut all: Vec<(u32, f64)> = logits.iter().zip(0..).map(|(&l, id)| (id, f64::from(l))).collect();
        for (id, logit) in &mut all {
            let count = recent.iter().filter(|t| *t == id).count();
            if count > 0 {
                let factor = f64::from(options.repeat_penalty);
                *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
                *logit -= f64::from(options.presence_penalty) + f64::from(options.frequency_penalty) * count as f64;
            }
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if options.top_k > 0 {
            all.truncate(options.top_k);
        }
        let best = all[0].1;
        let total: f64 = all.iter().map(|(_, l)| (l - best).exp()).sum();
        let mut sum = 0.0;
        let keep = all.iter().position(|(_, l)| {
            sum += (l - best).exp() / total;
            sum >= f64::from(options.top_p)
        });
        if let Some(keep) = keep.filter(|_| options.top_p < 1.0) {
            all.truncate(keep + 1);
        }
        all.retain(|(_, l)| (l - best).exp() >= f64::from(options.min_p));
        let scaled: Vec<f64> = all.iter().map(|(_, l)| ((l - best) / f64::from(options.temperature)).exp()).collect();
        let total: f64 = scaled.iter().sum();
        all.iter().zip(scaled).map(|((id, _), w)| (*id, w / total)).collect()
    }

    #[test]
    fn draws_follow_the_stages() {
        let cases = [
            SamplerOptions::default(),
            SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.3, ..Default::default() },
            SamplerOptions { top_k: 0, top_p: 0.9, min_p: 0.0, ..Default::default() },
            SamplerOptions { top_k: 1, ..Default::default() },
            SamplerOptions { top_k: 7, top_p: 1.0, min_p: 0.2, temperature: 0.4, ..Default::default() },
            SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.1, repeat_penalty: 1.3, ..Default::default() },
            SamplerOptions { presence_penalty: 1.5, frequency_penalty: 0.7, penalty_window: 4, ..Default::default() },
        ];
        for (case, options) in cases.into_iter().enumerate() {
            for n in [1, 2, 255, 1031] {
                let logits = noise(n, case as u64);
                let likely = plain(&SamplerOptions { top_k: 3, ..options.clone() }, &logits, &[]);
                let history: Vec<u32> = likely.iter().chain(&likely).map(|(id, _)| *id).collect();
                let recent = &history[history.len().saturating_sub(options.penalty_window)..];
                let expected = plain(&options, &logits, recent);
                let mut sampler = Sampler::new(options.clone()).unwrap();
                history.iter().for_each(|&token| sampler.accept(token));
                let mut changed = logits.clone();
                sampler.penalise(&mut changed);
                let best = most_likely(&changed).unwrap();
                sampler.select(&changed, best.logit);
                let mut chosen: Vec<u32> = sampler.candidates.iter().map(|c| c.id).collect();
                let mut ids: Vec<u32> = expected.iter().map(|(id, _)| *id).collect();
                chosen.sort_unstable();
                ids.sort_unstable();
                assert_eq!(chosen, ids, "case {case} with {n} tokens");

                const DRAWS: usize = 4000;
                let mut counts = vec![0usize; n];
                for _ in 0..DRAWS {
                    counts[sampler.sample(&mut logits.clone()).unwrap() as usize] += 1;
                }
                for (id, p) in expected {
                    let deviation = (p * (1.0 - p) / DRAWS as f64).sqrt();
                    let found = counts[id as usize] as f64 / DRAWS as f64;
                    assert!(
                        (found - p).abs() <= 5.0 * deviation + 3.0 / DRAWS as f64,
                        "case {case}, {n} tokens, token {id}: {found}, expected {p}"
                    );
                }
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        assert_eq!(sampler.sample(&mut [0.5, 3.0, -1.0, 3.0]).unwrap(), 1);
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -7.0]).unwrap(), 1);
    }

    #[test]
    fn equal_logits_are_cut_by_id() {
        let options = SamplerOptions { top_k: 3, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        sampler.select(&[1.0; 1000], 1.0);
        assert_eq!(sampler.candidates.iter().map(|c| c.id).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let options =
            SamplerOptions { seed: 42, top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        let logits = noise(50, 7);
        let tokens: Vec<u32> = (0..8).map(|_| sampler.sample(&mut logits.clone()).unwrap()).collect();
        assert_eq!(tokens, [21, 2, 2, 2, 2, 21, 2, 21]);
    }

    #[test]
    fn random_numbers_are_those_of_the_publication() {
        let mut sampler = Sampler::new(SamplerOptions { seed: 1_234_567, ..Default::default() }).unwrap();
        for expected in [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973] {
            assert_eq!(sampler.uniform(), (expected >> 11) as f64 / (1u64 << 53) as f64);
        }
    }

    #[test]
    fn wrong_logits_are_errors() {
        for options in [SamplerOptions::greedy(), SamplerOptions::default()] {
            let mut sampler = Sampler::new(options).unwrap();
            assert!(matches!(sampler.sample(&mut [1.0, f32::NAN]), Err(Error::Logits { id: 1, .. })));
            assert!(sampler.sample(&mut [1.0, f32::INFINITY]).is_err());
            assert!(sampler.sample(&mut [f32::NEG_INFINITY; 3]).is_err());
            assert!(sampler.sample(&mut []).is_err());
        }
    }

    #[test]
    fn options_out_of_range_are_named() {
        let bad = |options: SamplerOptions| Sampler::new(options).unwrap_err().to_string();
        let default = SamplerOptions::default;
        assert!(bad(SamplerOptions { temperature: -1.0, ..default() }).contains("temperature"));
        assert!(bad(SamplerOptions { temperature: f32::NAN, ..default() }).contains("temperature"));
        assert!(bad(SamplerOptions { top_p: 0.0, ..default() }).contains("top-p"));
        assert!(bad(SamplerOptions { min_p: 1.5, ..default() }).contains("min-p"));
        assert!(bad(SamplerOptions { repeat_penalty: 0.0, ..default() }).contains("repeat penalty"));
    }

    #[test]
    fn nothing_is_allocated_once_warm() {
        let options = SamplerOptions { top_k: 0, repeat_penalty: 1.1, penalty_window: 8, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        let step = |sampler: &mut Sampler, seed| {
            let token = sampler.sample(&mut noise(500, seed)).unwrap();
            sampler.accept(token);
            (
                sampler.candidates.capacity(),
                sampler.weights.capacity(),
                sampler.recent.capacity(),
                sampler.sorted.capacity(),
            )
        };
        let warm = (0..20).map(|seed| step(&mut sampler, seed)).last().unwrap();
        for seed in 20..60 {
            assert_eq!(step(&mut sampler, seed), warm);
        }
    }
}
