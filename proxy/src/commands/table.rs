//! Tables and colours for terminals.

use std::io::IsTerminal;

/// Colours, only if standard output is a terminal and NO_COLOR is not set (<https://no-color.org>).
#[derive(Clone, Copy)]
pub(crate) struct Paint(bool);

/// A table whose columns are as wide as their widest cell.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns of numbers, aligned right.
    numbers: Vec<bool>,
}

impl Paint {
    pub(crate) fn of_stdout() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self(wanted && std::io::stdout().is_terminal())
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(crate) fn quiet(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.with("31", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl Table {
    /// A heading that starts with `>` marks a column of numbers.
    pub(crate) fn new(heads: &[&str]) -> Self {
        let numbers = heads.iter().map(|head| head.starts_with('>')).collect();
        Self { rows: vec![heads.iter().map(|head| head.trim_start_matches('>').to_owned()).collect()], numbers }
    }

    pub(crate) fn row(&mut self, cells: &[&str]) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// The indented lines; the heading is dimmed.
    pub(crate) fn lines(&self, paint: Paint) -> String {
        let columns = self.numbers.len();
        let width = |column: usize| self.rows.iter().map(|row| visible(&row[column])).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |(nth, row): (usize, &Vec<String>)| {
            let cells = row.iter().zip(&widths).zip(&self.numbers).map(|((cell, width), is_number)| {
                let space = " ".repeat(width - visible(cell));
                if *is_number { format!("{space}{cell}") } else { format!("{cell}{space}") }
            });
            let line = format!("  {}", cells.collect::<Vec<_>>().join("  "));
            if nth == 0 { paint.quiet(line.trim_end()) } else { line.trim_end().to_owned() }
        };
        self.rows.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// A text from elsewhere must not control the terminal. Colours of [`Paint`] stay.
pub(crate) fn printable(text: &str) -> String {
    let is_colour = |rest: &str| ["[1m", "[2m", "[31m", "[32m", "[0m"].iter().any(|code| rest.starts_with(code));
    let kept = text.char_indices().map(|(at, c)| match c {
        '\x1b' if is_colour(&text[at + 1..]) => c,
        c if c.is_control() => '?',
        c => c,
    });
    kept.collect()
}

/// The width of a text without its colour codes.
fn visible(text: &str) -> usize {
    let mut count = 0;
    let mut in_colour = false;
    for c in text.chars() {
        match c {
            '\x1b' => in_colour = true,
            'm' if in_colour => in_colour = false,
            _ if in_colour => {}
            _ => count += 1,
        }
    }
    count
}

/// The format of the status page.
pub(crate) fn bytes(count: u64) -> String {
    let mut rest = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if rest < 1024.0 {
            let digits = usize::from(unit != "B" && rest < 10.0);
            return format!("{rest:.digits$} {unit}");
        }
        rest /= 1024.0;
    }
    format!("{rest:.1} TiB")
}

pub(crate) fn seconds(count: u64) -> String {
    match count {
        ..90 => format!("{count} s"),
        90..5_400 => format!("{} min", count / 60),
        5_400..129_600 => format!("{} h", count / 3600),
        _ => format!("{} d", count / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_with_colours_keeps_columns_aligned() {
        let paint = Paint(true);
        let mut table = Table::new(&["a", ">number", "b"]);
        table.row(&["long one", "5", &paint.bad("x")]);
        table.row(&["s", "1234567", "y"]);
        let lines = table.lines(Paint(false));
        assert_eq!(lines, "  a          number  b\n  long one        5  \x1b[31mx\x1b[0m\n  s         1234567  y");
        assert_eq!(visible(&paint.bold("é")), 1);
    }

    #[test]
    fn text_from_elsewhere_does_not_control_the_terminal() {
        assert_eq!(printable("a\x1b]0;title\x07\x1b[2J\nb"), "a?]0;title??[2J?b");
        assert_eq!(printable(&Paint(true).bad("x")), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn bytes_and_seconds_are_abbreviated() {
        assert_eq!([0, 1023, 1536, 20 << 30].map(bytes), ["0 B", "1023 B", "1.5 KiB", "20 GiB"]);
        assert_eq!([5, 600, 7_200, 864_000].map(seconds), ["5 s", "10 min", "2 h", "10 d"]);
    }
}
