// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package redact decides which words of a server may be shown if the server knows a
// secret that must not be.
//
// A server that refuses a request may repeat what it was sent, verbatim or in an encoding
// of its own. A text that repeats too much of the secret is withheld as a whole:
// replacing only the secret requires knowing where an encoded secret begins and ends.
//
// Too much is half of the secret and at least eight characters of it, or all of a shorter
// secret. A shorter piece withholds nothing. Otherwise, someone who can make the server
// repeat a text of their own could guess the secret one character at a time by watching
// which guess is withheld.
package redact

import (
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxUndoings is how many nested encodings are undone.
	maxUndoings = 5

	// maxRead limits, in bytes, how much one call reads of a text and of everything it
	// decodes to. A text that needs more was built to, and is withheld.
	maxRead = 512 << 10

	// fewest is the smallest number of consecutive characters that counts as a
	// repetition, unless the secret is shorter.
	fewest = 8

	// longestLine limits, in characters, what Line returns.
	longestLine = 256
)

// A Redactor knows one secret, and phrases that must not be shown either. It is safe for
// concurrent use.
type Redactor struct {
	secret  []rune // folded
	run     int    // this many consecutive characters of it are too many
	phrases []string

	shortest int // length of the shortest thing to find
}

// New returns a Redactor for secret, which may be empty, and for phrases. A phrase is
// found in any case and encoding too, but only as a whole.
func New(secret string, phrases ...string) *Redactor {
	r := &Redactor{secret: []rune(fold(printable(secret)))}
	r.run = min(len(r.secret), max(fewest, (len(r.secret)+1)/2))
	r.shortest = r.run
	for _, phrase := range phrases {
		r.phrases = append(r.phrases, fold(phrase))
		if r.shortest == 0 || len(phrase) < r.shortest {
			r.shortest = len(phrase)
		}
	}
	return r
}

// Withholds reports whether texts, which would be shown one after the other, must not be
// shown: they contain too much of the secret or a phrase, as they are or after up to five
// undoings of an encoding.
//
// The texts are searched twice. Joined without a separator, they reveal an echo that
// spans several texts; joined with one, an escape at the end of a text does not swallow
// the next.
func (r *Redactor) Withholds(texts ...string) bool {
	windows := newWindows(r.secret, r.run)
	seen := make(map[string]bool)
	left := maxRead
	// From here on, only the result depends on the secret, so giving up reveals nothing
	// about it.
	level := []string{strings.Join(texts, ""), strings.Join(texts, " ")}
	for undone := 0; len(level) > 0; undone++ {
		var next []string
		for _, text := range level {
			text = printable(text)
			if text == "" || seen[text] {
				continue
			}
			seen[text] = true
			if left -= len(text); left < 0 {
				return true
			}
			if folded := fold(text); windows.in(folded) || r.holdsPhrase(folded) {
				return true
			}
			if undone < maxUndoings {
				next = append(next, undoings(text, r.shortest)...)
			}
		}
		level = next
	}
	return false
}

func (r *Redactor) holdsPhrase(folded string) bool {
	return slices.ContainsFunc(r.phrases, func(phrase string) bool { return strings.Contains(folded, phrase) })
}

// Line returns text as one line for an error or a log: without characters that do not
// print, and cut to 256 characters.
func Line(text string) string {
	text = strings.ToValidUTF8(printable(text), "\uFFFD")
	if runes := []rune(text); len(runes) > longestLine {
		return string(runes[:longestLine-1]) + "…"
	}
	return text
}

// printable removes the characters that do not print, because they separate what belongs
// together. It keeps bytes that are not UTF-8, since they may be another encoding.
func printable(text string) string {
	hidden := func(r rune) bool { return !unicode.IsPrint(r) }
	if !strings.ContainsFunc(text, hidden) {
		return text
	}
	var kept strings.Builder
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRuneInString(text[i:])
		if !hidden(r) {
			kept.WriteString(text[i : i+size])
		}
		i += size
	}
	return kept.String()
}

// fold makes texts comparable that differ only in case, or in whether a space was
// form-encoded as a plus sign. It treats a byte that is not UTF-8 as a character of
// Latin-1, as JavaScript's btoa() does.
func fold(text string) string {
	var folded strings.Builder
	folded.Grow(len(text))
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRuneInString(text[i:])
		if r == utf8.RuneError && size == 1 {
			r = rune(text[i])
		}
		i += size
		if r == '+' {
			r = ' '
		}
		// By way of upper case, so characters that share one (s and ſ) become equal.
		folded.WriteRune(unicode.ToLower(unicode.ToUpper(r)))
	}
	return folded.String()
}

// windows finds any run of length characters of a secret in a text, in time linear in the
// text, with the rolling hash of Karp and Rabin.
type windows struct {
	secret []rune
	length int
	starts map[int64][]int // by hash: where in the secret such runs begin
	lead   int64           // weight of a run's first character in its hash
}

// hashBase is odd, so it has an inverse modulo 2^64, and otherwise arbitrary.
const hashBase int64 = 0x1e3779b97f4a7c15

func newWindows(secret []rune, length int) windows {
	w := windows{secret: secret, length: length, starts: make(map[int64][]int), lead: 1}
	for range length - 1 {
		w.lead *= hashBase
	}
	w.slide(secret, func(end int, hash int64) bool {
		w.starts[hash] = append(w.starts[hash], end-length)
		return false
	})
	return w
}

// in reports whether text contains a run.
func (w windows) in(text string) bool {
	runes := []rune(text)
	return w.slide(runes, func(end int, hash int64) bool {
		run := runes[end-w.length : end]
		return slices.ContainsFunc(w.starts[hash], func(start int) bool {
			return slices.Equal(run, w.secret[start:start+w.length])
		})
	})
}

// slide calls visit with the end and the hash of each run in text until visit returns
// true, and reports whether it did.
func (w windows) slide(text []rune, visit func(end int, hash int64) bool) bool {
	if w.length == 0 {
		return false
	}
	var hash int64 // overflows, as intended
	for i, r := range text {
		if i >= w.length {
			hash -= w.lead * int64(text[i-w.length])
		}
		hash = hash*hashBase + int64(r)
		if i+1 >= w.length && visit(i+1, hash) {
			return true
		}
	}
	return false
}
