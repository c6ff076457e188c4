//! Max-min fair shares of links.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// The links that a flow passes. Without any it does not move.
pub(crate) type LinkPath = [Option<usize>; 4];

/// The rate of each flow over links with these capacities. The link with the least for each of its flows fixes their
/// rates first, then the next link.
pub(crate) fn shares(mut left: Vec<f64>, routes: &[LinkPath]) -> Vec<f64> {
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); left.len()];
    for (nth, route) in routes.iter().enumerate() {
        route.iter().flatten().for_each(|link| members[*link].push(nth));
    }
    let mut open: Vec<usize> = members.iter().map(Vec::len).collect();
    let mut rates: Vec<Option<f64>> = vec![None; routes.len()];
    let used = (0..members.len()).filter(|link| open[*link] > 0);
    let mut heap: BinaryHeap<Least> = used.map(|link| Least(share(left[link], open[link]), link)).collect();
    while let Some(Least(known, link)) = heap.pop() {
        if open[link] == 0 {
            continue;
        }
        let now = share(left[link], open[link]);
        if now > known * 1.000_001 {
            heap.push(Least(now, link));
            continue;
        }
        for nth in std::mem::take(&mut members[link]) {
            if rates[nth].is_none() {
                rates[nth] = Some(now);
                for link in routes[nth].iter().flatten() {
                    left[*link] = (left[*link] - now).max(0.0);
                    open[*link] -= 1;
                }
            }
        }
    }
    rates.into_iter().map(Option::unwrap_or_default).collect()
}

#[allow(clippy::cast_precision_loss, reason = "few flows")]
fn share(left: f64, open: usize) -> f64 {
    left / open as f64
}

/// A link, ordered by its share for each flow. The smallest share is the greatest, for the heap.
struct Least(f64, usize);

impl PartialEq for Least {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Least {}

impl PartialOrd for Least {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Least {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0).then(other.1.cmp(&self.1))
    }
}
