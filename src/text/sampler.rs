//! The sampler: from the logits of one position to the next token, as `tandem_spec::sampler` defines it. Owns the quick
//! way there: selection instead of sorting, and nothing allocated after the first few tokens. Refuses options out of
//! range and logits that are not numbers.

use std::cmp::Ordering;
use tandem_spec::sampler::{random, share, weight};

pub use tandem_spec::SamplerOptions;

use super::Error;

/// Says which option is out of range.
///
/// # Errors
/// Names the option, its range and the value.
pub fn check(options: &SamplerOptions) -> Result<(), Error> {
    let check = |good: bool, option, expected, found: f32| {
        if good { Ok(()) } else { Err(Error::Option { option, expected, found: found.to_string() }) }
    };
    let &SamplerOptions { temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, .. } =
        options;
    check(temperature.is_finite() && temperature >= 0.0, "temperature", "a number of at least 0", temperature)?;
    check(top_p > 0.0 && top_p <= 1.0, "top-p", "a number above 0 and at most 1", top_p)?;
    check((0.0..=1.0).contains(&min_p), "min-p", "a number from 0 to 1", min_p)?;
    let positive = repeat_penalty.is_finite() && repeat_penalty > 0.0;
    check(positive, "repeat penalty", "a number above 0", repeat_penalty)?;
    check(presence_penalty.is_finite(), "presence penalty", "a number", presence_penalty)?;
    check(frequency_penalty.is_finite(), "frequency penalty", "a number", frequency_penalty)
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

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    sorted: Vec<u32>, // recent tokens in order, to count them
    candidates: Candidates,
}

impl Sampler {
    /// A sampler with these options.
    ///
    /// # Errors
    /// An option that is out of range, with its name, its range and the value.
    pub fn new(options: SamplerOptions) -> Result<Self, Error> {
        check(&options)?;
        Ok(Self { options, sorted: Vec::new(), candidates: Candidates::default() })
    }

    /// What it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The token after `prefix`: all tokens that the model has seen. `logits` `[n_vocab]` are changed by the penalties.
    ///
    /// # Errors
    /// A logit that is NaN or infinitely large, or no logit that is a number: the computation before is wrong.
    pub fn sample(&mut self, logits: &mut [f32], prefix: &[u32]) -> Result<u32, Error> {
        self.penalise(logits, prefix);
        let best = most_likely(logits)?;
        if self.options.temperature == 0.0 {
            return Ok(best.id);
        }
        self.select(logits, best.logit);
        let (temperature, best) = (self.options.temperature, best.logit);
        let weight = |c: &Candidate| weight((c.logit - best) / temperature);
        let total = self.candidates.list.iter().map(weight).sum();
        let drawn = share(total, random(self.options.seed, prefix.len()));
        let at = self.candidates.reach(weight, |sum| sum > drawn);
        Ok(self.candidates.list[at].id)
    }

    fn penalise(&mut self, logits: &mut [f32], prefix: &[u32]) {
        self.sorted.clear();
        self.sorted.extend(self.options.recent(prefix));
        self.sorted.sort_unstable();
        for run in self.sorted.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(run[0] as usize) else { continue };
            *logit = self.options.penalised(*logit, run.len());
        }
    }

    /// Top-k, top-p and min-p: leaves the tokens to draw from in `candidates`.
    fn select(&mut self, logits: &[f32], best: f32) {
        let k = if self.options.top_k == 0 { logits.len() } else { self.options.top_k.min(logits.len()) };
        self.candidates.take(logits, k);
        let weight = |c: &Candidate| weight(c.logit - best);
        if self.options.top_p_share() > 0 {
            let wanted = share(self.candidates.list.iter().map(weight).sum(), self.options.top_p_share());
            let last = self.candidates.reach(weight, |sum| sum >= wanted);
            self.candidates.truncate(last + 1);
        }
        if self.options.min_p_weight() > 0 {
            self.candidates.retain(|c| weight(c) >= self.options.min_p_weight());
        }
    }
}

/// Tokens that may be drawn; as many of the most likely as were needed are sorted.
#[derive(Clone, Debug, Default)]
struct Candidates {
    list: Vec<Candidate>, // the first `n_sorted` are the most likely, in order
    n_sorted: usize,
}

impl Candidates {
    /// The `k` most likely tokens of `logits`.
    fn take(&mut self, logits: &[f32], k: usize) {
        if k < logits.len() {
            most_likely_k(logits, k, &mut self.list);
            self.n_sorted = k;
        } else {
            self.list.clear();
            self.list.extend(logits.iter().zip(0..).map(|(&logit, id)| Candidate { logit, id }));
            self.n_sorted = 0;
        }
    }

    /// Index of the first candidate, the most likely ahead, at which the sum of weights is `enough`; the last one if
    /// none is. Few tokens hold most of the weight: the head of the list is sorted, and more of it only if needed.
    fn reach(&mut self, weight: impl Fn(&Candidate) -> u64, enough: impl Fn(u64) -> bool) -> usize {
        let (mut sum, mut at) = (0, 0);
        loop {
            for (i, candidate) in self.list[at..self.n_sorted].iter().enumerate() {
                sum += weight(candidate);
                if enough(sum) {
                    return at + i;
                }
            }
            at = self.n_sorted;
            if at == self.list.len() {
                return at - 1;
            }
            let end = (at * 4).max(256).min(self.list.len());
            if end < self.list.len() {
                self.list[at..].select_nth_unstable_by(end - at, Candidate::order);
            }
            self.list[at..end].sort_unstable_by(Candidate::order);
            self.n_sorted = end;
        }
    }

    fn truncate(&mut self, n: usize) {
        self.list.truncate(n);
        self.n_sorted = self.n_sorted.min(n);
    }

    fn retain(&mut self, keep: impl Fn(&Candidate) -> bool) {
        self.n_sorted = self.list[..self.n_sorted].iter().filter(|c| keep(c)).count();
        self.list.retain(keep);
    }
}

/// The token with the highest logit, the first one among equals.
fn most_likely(logits: &[f32]) -> Result<Candidate, Error> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
    for (&logit, id) in logits.iter().zip(0..) {
        if logit.is_nan() {
            return Err(Error::Logits { id, found: logit });
        }
        if logit.total_cmp(&best.logit).is_gt() {
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
        if kept.len() < k || logit.total_cmp(&bar).is_gt() {
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
        let uniform = |i: usize| random(seed, i) as f32 / u64::MAX as f32;
        (0..n).map(|i| (0..6).map(|j| uniform(6 * i + j)).sum::<f32>() * 8.0 - 24.0).collect()
    }

    /// The stages written as plainly as possible: full sorts, full sums. Token ids and probabilities, most likely
    /// first.
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
                let mut changed = logits.clone();
                sampler.penalise(&mut changed, &history);
                let best = most_likely(&changed).unwrap();
                sampler.select(&changed, best.logit);
                let mut chosen: Vec<u32> = sampler.candidates.list.iter().map(|c| c.id).collect();
                let mut ids: Vec<u32> = expected.iter().map(|(id, _)| *id).collect();
                chosen.sort_unstable();
                ids.sort_unstable();
                assert_eq!(chosen, ids, "case {case} with {n} tokens");

                const DRAWS: usize = 4000;
                let mut counts = vec![0usize; n];
                for seed in 0..DRAWS as u64 {
                    let options = SamplerOptions { seed, ..options.clone() };
                    let token = Sampler::new(options.clone()).unwrap().sample(&mut logits.clone(), &history).unwrap();
                    counts[token as usize] += 1;
                    if seed < 20 {
                        assert_eq!(options.choose(&logits, &history), Some(token), "case {case}, {n} tokens");
                    }
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
    fn draws_are_those_of_the_reference() {
        let mut n_checked = 0;
        for seed in 0..300u64 {
            let pick = |i: usize, n: u64| random(seed, 1000 + i) % n;
            let options = SamplerOptions {
                temperature: [0.0, 0.3, 1.0, 2.5][pick(0, 4) as usize],
                top_k: [0, 1, 5, 40, 300][pick(1, 5) as usize],
                top_p: [1.0, 0.95, 0.5, 1e-20][pick(2, 4) as usize],
                min_p: [0.0, 0.05, 0.7, 1.0][pick(3, 4) as usize],
                repeat_penalty: [1.0, 1.0, 1.2, 0.8][pick(4, 4) as usize],
                presence_penalty: [0.0, 0.4][pick(5, 2) as usize],
                frequency_penalty: [0.0, -0.3][pick(6, 2) as usize],
                penalty_window: [0, 3, 64][pick(7, 3) as usize],
                seed,
            };
            let n = [1, 7, 256, 1031][pick(8, 4) as usize];
            let mut logits = noise(n, seed);
            // Ties, zeros of both signs and tokens that are ruled out.
            for i in 0..n / 3 {
                logits[i] = [logits[n - 1], 0.0, -0.0, f32::NEG_INFINITY][pick(20 + i, 4) as usize];
            }
            let prefix: Vec<u32> = (0..50).map(|i| pick(2000 + i, n as u64) as u32).collect();
            let mut sampler = Sampler::new(options.clone()).unwrap();
            for position in 1..prefix.len() {
                let want = options.choose(&logits, &prefix[..position]);
                let got = sampler.sample(&mut logits.clone(), &prefix[..position]).ok();
                assert_eq!(got, want, "{n} logits at {position}, {options:?}");
                n_checked += 1;
            }
        }
        assert!(n_checked > 10_000);
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        assert_eq!(sampler.sample(&mut [0.5, 3.0, -1.0, 3.0], &[]).unwrap(), 1);
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -7.0], &[]).unwrap(), 1);
    }

    #[test]
    fn equal_logits_are_cut_by_id() {
        let options = SamplerOptions { top_k: 3, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        sampler.select(&[1.0; 1000], 1.0);
        assert_eq!(sampler.candidates.list.iter().map(|c| c.id).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let options =
            SamplerOptions { seed: 42, top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        let logits = noise(50, 7);
        let tokens: Vec<u32> = (0..8).map(|n| sampler.sample(&mut logits.clone(), &[0; 8][..n]).unwrap()).collect();
        assert_eq!(tokens, [21, 2, 2, 2, 2, 21, 2, 21]);
    }

    #[test]
    fn wrong_logits_are_errors() {
        for options in [SamplerOptions::greedy(), SamplerOptions::default()] {
            let mut sampler = Sampler::new(options).unwrap();
            assert!(matches!(sampler.sample(&mut [1.0, f32::NAN], &[]), Err(Error::Logits { id: 1, .. })));
            assert!(sampler.sample(&mut [1.0, f32::INFINITY], &[]).is_err());
            assert!(sampler.sample(&mut [f32::NEG_INFINITY; 3], &[]).is_err());
            assert!(sampler.sample(&mut [], &[]).is_err());
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
        let mut prefix = Vec::new();
        let mut step = |sampler: &mut Sampler, seed| {
            prefix.push(sampler.sample(&mut noise(500, seed), &prefix).unwrap());
            (sampler.candidates.list.capacity(), sampler.sorted.capacity())
        };
        let warm = (0..20).map(|seed| step(&mut sampler, seed)).last().unwrap();
        for seed in 20..60 {
            assert_eq!(step(&mut sampler, seed), warm);
        }
    }
}
