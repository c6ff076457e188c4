//! Which bytes of a blob: disjoint spans in order.

use super::Span;

/// A set of bytes. Spans that touch are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// Adds a span, which may overlap the others.
    pub fn insert(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        let first = self.0.partition_point(|known| known.end < span.start);
        let last = self.0.partition_point(|known| known.start <= span.end);
        if first == last {
            self.0.insert(first, span);
            return;
        }
        let end = span.end.max(self.0[last - 1].end);
        self.0[first].start = span.start.min(self.0[first].start);
        self.0[first].end = end;
        self.0.drain(first + 1..last);
    }

    /// Removes a span.
    pub fn remove(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        let cut = |known: &Span| {
            let before = Span { start: known.start, end: known.end.min(span.start).max(known.start) };
            let after = Span { start: known.start.max(span.end).min(known.end), end: known.end };
            let whole = known.end <= span.start || known.start >= span.end;
            if whole { vec![*known] } else { vec![before, after] }
        };
        self.0 = self.0.iter().flat_map(cut).filter(|span| !span.is_empty()).collect();
    }

    /// The end of the run of bytes that begins at `start`; `start` itself if that byte is missing.
    pub fn run_end(&self, start: u64) -> u64 {
        let next = self.0.partition_point(|known| known.end <= start);
        self.0.get(next).filter(|known| known.start <= start).map_or(start, |known| known.end)
    }

    /// The first run of missing bytes at or after `from`, in a blob of `total` bytes.
    pub fn gap(&self, from: u64, total: u64) -> Option<Span> {
        let start = self.run_end(from);
        let next = self.0.partition_point(|known| known.start <= start);
        let end = self.0.get(next).map_or(total, |known| known.start.min(total));
        (start < end).then_some(Span { start, end })
    }

    pub fn iter(&self) -> impl Iterator<Item = Span> {
        self.0.iter().copied()
    }

    /// Number of bytes in the set.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|span| span.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Span> for Spans {
    fn from_iter<I: IntoIterator<Item = Span>>(all: I) -> Self {
        let mut spans = Self::default();
        all.into_iter().for_each(|span| spans.insert(span));
        spans
    }
}

impl From<Span> for Spans {
    fn from(span: Span) -> Self {
        let mut spans = Self::default();
        spans.insert(span);
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: usize = 24;

    fn span(start: u64, end: u64) -> Span {
        Span { start, end }
    }

    /// Every operation against a plain list of flags.
    #[test]
    fn spans_agree_with_a_list_of_flags() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2000 {
            let (mut spans, mut flags) = (Spans::default(), [false; TOTAL]);
            for _ in 0..12 {
                let start = random.usize(0..TOTAL);
                let end = random.usize(start..=TOTAL);
                let put = random.u8(0..3) > 0;
                let part = span(start as u64, end as u64);
                if put {
                    spans.insert(part);
                } else {
                    spans.remove(part);
                }
                flags[start..end].fill(put);
            }
            assert_eq!(spans.len(), flags.iter().filter(|flag| **flag).count() as u64);
            assert!(spans.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{spans:?}");
            for from in 0..TOTAL {
                let run = flags[from..].iter().take_while(|flag| **flag).count();
                assert_eq!(spans.run_end(from as u64), (from + run) as u64, "{spans:?} from {from}");
                let gap = (from..TOTAL).find(|at| !flags[*at]).map(|start| {
                    let len = flags[start..].iter().take_while(|flag| !**flag).count();
                    span(start as u64, (start + len) as u64)
                });
                assert_eq!(spans.gap(from as u64, TOTAL as u64), gap, "{spans:?} from {from}");
            }
        }
    }
}
