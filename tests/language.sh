#!/bin/sh
# The words of docs/glossary.md: no comment, message, document or help text has a word of the list below, and no two types of
# the program share a name. Prints file, line, rule and text of each finding; exits with 1 if there is one.
#
#   tests/language.sh           # the whole repository
#   tests/language.sh FILE...   # some files
set -eu
cd "$(dirname "$0")/.."

# The subject of a sentence is a component: a client, a peer, an owner, dray, an upstream registry.
words='who|whoever|whom|somebody|someone|nobody|anybody|everybody|those who|that one|so long|so many|is told|are told|here'

[ $# -gt 0 ] || set -- $(git ls-files '*.rs' '*.md' '*.toml' '*.sh' '*.yaml' '*.tpl' '*.txt' '*.html' '*.js' '*.service' Makefile |
    while read -r file; do [ -e "$file" ] && echo "$file"; done |
    grep -v -e '^tests/language.sh$' -e '^loadtest/RESULTS.md$' -e '^tests/tools/')

awk -v words="$words" '
    # The text of a line that people read: all of a document, the comments and string literals of code.
    function prose(line, file,    text, rest, at) {
        if (file ~ /\.(md|txt|html)$/) return line
        if (file !~ /\.rs$/) {
            if (match(line, /(^|[ \t])(#|\/\/|\{\{- \/\*)/)) text = substr(line, RSTART)
            if (file ~ /\.(yaml|tpl)$/) text = line
            return text
        }
        rest = line
        while (match(rest, /"([^"\\]|\\.)*"|\/\/.*$/)) {
            text = text " " substr(rest, RSTART, RLENGTH)
            rest = substr(rest, RSTART + RLENGTH)
        }
        # A literal over several lines has no quote at its continuation.
        if (text == "" && line !~ /[;{}()=]/ && line ~ /\\$/) text = line
        return text
    }
    FNR == 1 { code = 0 }
    FILENAME ~ /\.md$/ && /^```/ { code = !code }
    {
        text = " " tolower(prose($0, FILENAME)) " "
        gsub(/`[^`]*`/, " ", text)
        if (match(text, "[^a-z_-](" words ")[^a-z_-]")) {
            found = substr(text, RSTART + 1, RLENGTH - 2)
            printf "%s:%d: the word \"%s\" (name the component): %s\n", FILENAME, FNR, found, $0
            bad = 1
        }
    }
    FILENAME ~ /^proxy\/src\// && match($0, /^(pub(\([a-z]+\))? )?(struct|enum|trait|type) [A-Z][A-Za-z0-9]*/) {
        name = substr($0, RSTART, RLENGTH); sub(/.* /, "", name)
        if (name in place) {
            printf "%s:%d: the type %s is also at %s: one name, one meaning\n", FILENAME, FNR, name, place[name]
            bad = 1
        }
        place[name] = FILENAME ":" FNR
    }
    END { exit bad }
' "$@"
