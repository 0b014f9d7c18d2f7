//! What samples say: quantiles, and whether two sets of them differ.
#![forbid(unsafe_code)]

use serde::Serialize;

/// Five numbers of a set of samples, in the samples' own unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many samples there are.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// The first quartile.
    pub p25: f64,
    /// The median.
    pub median: f64,
    /// The third quartile.
    pub p75: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Summarises `samples`; none when there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            count: sorted.len(),
            min: *sorted.first()?,
            p25: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            p75: quantile(&sorted, 0.75)?,
            max: *sorted.last()?,
        })
    }
}

/// The quantile `q` (0 to 1) of sorted samples, interpolated between neighbours.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = q.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    let (low, high) = (sorted[below], sorted[above]);
    Some(low + (high - low) * (position - below as f64))
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5).unwrap_or(f64::NAN)
}

/// How a figure compares with the one of an earlier run. Lower is better for every figure here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Smaller, and hardly by chance.
    Better,
    /// Larger, and hardly by chance.
    Worse,
    /// The difference is within the threshold, or chance explains it.
    Noise,
}

/// Chance that a difference this large arises by shuffling, below which it is believed.
pub const SIGNIFICANCE: f64 = 0.01;

const SHUFFLES: u32 = 2_000;

/// Compares two sets of samples: `threshold` is the relative change of the median (0.05: five per cent)
/// below which a difference is not worth a word, however sure it is.
pub fn compare(old: &[f64], new: &[f64], threshold: f64) -> Verdict {
    let (before, after) = (median(old), median(new));
    let change = (after - before) / before;
    if !change.is_finite() || change.abs() <= threshold || chance(old, new) >= SIGNIFICANCE {
        return Verdict::Noise;
    }
    if change < 0.0 {
        Verdict::Better
    } else {
        Verdict::Worse
    }
}

/// Permutation test on the difference of medians: the share of random relabellings of the pooled samples
/// whose difference is at least as large as the one observed. Deterministic: the shuffles come from a
/// generator with a fixed seed, so the same reports give the same verdict.
pub fn chance(old: &[f64], new: &[f64]) -> f64 {
    let observed = (median(new) - median(old)).abs();
    let mut pool: Vec<f64> = old.iter().chain(new).copied().collect();
    let mut random = SplitMix(0x9e37_79b9_7f4a_7c15);
    let mut as_large = 0;
    for _ in 0..SHUFFLES {
        for last in (1..pool.len()).rev() {
            pool.swap(last, random.below(last + 1));
        }
        let (a, b) = pool.split_at(old.len());
        as_large += u32::from((median(b) - median(a)).abs() >= observed);
    }
    // The observed labelling is one of the permutations: the chance is never zero.
    f64::from(as_large + 1) / f64::from(SHUFFLES + 1)
}

/// SplitMix64: enough to shuffle with, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples around `centre` with a long right tail, as start-up times have.
    fn simulated(random: &mut SplitMix, centre: f64, count: usize) -> Vec<f64> {
        let mut unit = || (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        (0..count)
            .map(|_| centre * (1.0 + 0.04 * unit() + 0.1 * unit().powi(8)))
            .collect()
    }

    #[test]
    fn a_planted_regression_is_found_and_no_change_is_not() {
        let mut random = SplitMix(7);
        for _ in 0..50 {
            let old = simulated(&mut random, 10.0, 12);
            let same = simulated(&mut random, 10.0, 12);
            let slower = simulated(&mut random, 11.5, 12);
            assert_eq!(compare(&old, &same, 0.05), Verdict::Noise);
            assert_eq!(compare(&old, &slower, 0.05), Verdict::Worse);
            assert_eq!(compare(&slower, &old, 0.05), Verdict::Better);
        }
    }

    #[test]
    fn quantiles_interpolate() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).expect("four samples");
        assert_eq!((summary.min, summary.median, summary.max), (1.0, 2.5, 4.0));
        assert_eq!((summary.p25, summary.p75), (1.75, 3.25));
        assert!(Summary::of(&[]).is_none());
    }

    #[test]
    fn a_figure_that_was_zero_is_never_a_regression_by_division() {
        assert_eq!(compare(&[0.0; 10], &[0.0; 10], 0.05), Verdict::Noise);
    }
}
