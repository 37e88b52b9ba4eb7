//! How the next token is chosen from logits: options, the arithmetic of every stage, and a plain reference. The
//! stages in order: penalties, top-k, top-p, min-p, temperature, draw; top-p and min-p look at probabilities before the
//! temperature.
//! A choice is a pure function of options, logits and the tokens so far. Its arithmetic is f32 operations that are
//! rounded one by one, and integers from there on, so that sums do not depend on their order: every
//! implementation that follows it gives the same token. Refuses logits that are not numbers.

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

/// Weight of the most likely token: weights count in this share of it.
pub const UNIT: u64 = 1 << 40;

impl SamplerOptions {
    /// Most likely token, no penalties.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// How many recent tokens penalties look at: none where there are no penalties.
    pub fn window(&self) -> usize {
        let penalises = self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        if penalises { self.penalty_window } else { 0 }
    }

    /// Those of the tokens `prefix`.
    pub fn recent<'t>(&self, prefix: &'t [u32]) -> &'t [u32] {
        &prefix[prefix.len().saturating_sub(self.window())..]
    }

    /// The logit of a token that occurs `count` times, at least once, among the recent ones.
    pub fn penalised(&self, logit: f32, count: usize) -> f32 {
        let factor = if logit > 0.0 { 1.0 / self.repeat_penalty } else { self.repeat_penalty };
        logit * factor - (self.presence_penalty + self.frequency_penalty * count as f32)
    }

    /// Top-p in units of 2^-64; 0 where it keeps all. A token is kept while the weights before it sum to less than
    /// this share of all.
    pub fn top_p_share(&self) -> u64 {
        if self.top_p >= 1.0 { 0 } else { ((f64::from(self.top_p) * 2f64.powi(64)) as u64).max(1) }
    }

    /// Least weight that min-p keeps.
    pub fn min_p_weight(&self) -> u64 {
        (f64::from(self.min_p) * UNIT as f64) as u64
    }

    /// Reference: the token after `prefix`, or `None` where a logit is NaN or infinitely large, or none is finite.
    pub fn choose(&self, logits: &[f32], prefix: &[u32]) -> Option<u32> {
        let recent = self.recent(prefix);
        let penalised = |(&logit, id): (&f32, u32)| match recent.iter().filter(|t| **t == id).count() {
            0 => (logit, id),
            count => (self.penalised(logit, count), id),
        };
        let mut kept: Vec<(f32, u32)> = logits.iter().zip(0..).map(penalised).collect();
        if kept.iter().any(|(logit, _)| logit.is_nan() || *logit == f32::INFINITY) {
            return None;
        }
        kept.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let best = kept.first().filter(|(logit, _)| logit.is_finite())?.0;
        if self.temperature == 0.0 {
            return Some(kept[0].1);
        }
        if self.top_k > 0 {
            kept.truncate(self.top_k);
        }
        if self.top_p_share() > 0 {
            let wanted = share(kept.iter().map(|c| weight(c.0 - best)).sum(), self.top_p_share());
            let mut sum = 0;
            let enough = kept.iter().position(|c| {
                sum += weight(c.0 - best);
                sum >= wanted
            });
            kept.truncate(enough.map_or(kept.len(), |last| last + 1));
        }
        kept.retain(|c| weight(c.0 - best) >= self.min_p_weight());
        let weights: Vec<u64> = kept.iter().map(|c| weight((c.0 - best) / self.temperature)).collect();
        let drawn = share(weights.iter().sum(), random(self.seed, prefix.len()));
        let mut sum = 0;
        let at = weights.iter().position(|w| {
            sum += w;
            sum > drawn
        });
        at.map(|at| kept[at].1)
    }
}

/// `part` of `total`, where `part` is in units of 2^-64, rounded down.
pub fn share(total: u64, part: u64) -> u64 {
    ((u128::from(total) * u128::from(part)) >> 64) as u64
}

/// The random number that draws the token at `position`: output number `position` of SplitMix64 (Steele, Lea and Flood,
/// "Fast splittable pseudorandom number generators", 2014) started at `seed`.
pub fn random(seed: u64, position: usize) -> u64 {
    let mut z = seed.wrapping_add((position as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// `exp(x)` in units of 1 / [`UNIT`], for `x` up to 0: `x = n ln 2 + r` with the series of `exp(r)` to the seventh
/// power, every operation rounded to f32 on its own. The relative error is below 3e-7; less than one unit is 0.
pub fn weight(x: f32) -> u64 {
    /// Adding it rounds to an integer, ties to even.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has few bits, so that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const SERIES: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    if x.is_nan() || x <= -28.0 {
        return 0;
    }
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let exp = SERIES.iter().fold(0.0, |sum, c| sum * r + c);
    (exp * f32::from_bits(((n as i32 + 127 + 40) as u32) << 23)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_exponentials() {
        assert_eq!(weight(0.0), UNIT);
        assert_eq!(weight(-0.0), UNIT);
        for x in [f32::NEG_INFINITY, f32::NAN, -100.0, -28.0] {
            assert_eq!(weight(x), 0);
        }
        let mut worst = 0f64;
        for i in 0..1_000_000 {
            let x = -27.7 * i as f32 / 1e6;
            let want = f64::from(x).exp() * UNIT as f64;
            worst = worst.max(((weight(x) as f64 - want).abs() - 1.0) / want);
        }
        assert!(worst < 3e-7, "{worst:e}");
    }

    #[test]
    fn random_numbers_are_those_of_the_publication() {
        let first = [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973];
        assert_eq!([0, 1].map(|position| random(1_234_567, position)), first);
    }

    #[test]
    fn shares_end_below_the_whole() {
        assert_eq!(share(UNIT, u64::MAX), UNIT - 1);
        assert_eq!(share(10, 1 << 63), 5);
        let all = SamplerOptions { top_p: 1.0, min_p: 1.0, ..Default::default() };
        assert_eq!((all.top_p_share(), all.min_p_weight()), (0, UNIT));
        assert_eq!(SamplerOptions { top_p: 0.5, ..all }.top_p_share(), 1 << 63);
    }
}
