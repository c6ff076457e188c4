//! Ranges lie within their body and do not overlap, and a printed Content-Range parses again.
#![no_main]

use dray_fuzz::oci::{ContentRange, RangeSet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, u64)| {
    let (text, total) = input;
    if let Some(set) = RangeSet::parse(text) {
        let mut spans = set.within(total);
        for span in &spans {
            assert!(span.start < span.end && span.end <= total);
            assert_eq!(span.content_range(total).parse(), Ok(ContentRange { span: *span, total }));
        }
        spans.sort_by_key(|span| span.start);
        assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
    let _ = text.parse::<ContentRange>();
});
