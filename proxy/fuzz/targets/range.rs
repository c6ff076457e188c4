//! A range lies within its body, and a Content-Range that is printed is read back.
#![no_main]

use dray_fuzz::oci::{ContentRange, RangeRequest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, u64)| {
    let (text, total) = input;
    if let Some(span) = RangeRequest::parse(text).and_then(|range| range.within(total).ok()) {
        assert!(span.start < span.end && span.end <= total);
        assert_eq!(span.content_range(total).parse(), Ok(ContentRange { span, total }));
    }
    let _ = text.parse::<ContentRange>();
});
