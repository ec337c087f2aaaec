// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package redact

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf16"
)

// encoder is a way in which a server may repeat what it received.
type encoder struct {
	name   string
	encode func(string) string
	// beforeBase64 is set for encodings that would destroy base64, which is
	// case-sensitive.
	beforeBase64 bool
}

var encoders = []encoder{
	{name: "verbatim", encode: func(s string) string { return s }},
	{name: "percent, query", encode: url.QueryEscape},
	{name: "percent, path", encode: url.PathEscape},
	{name: "percent, all", encode: eachByte("%%%02X")},
	{name: "percent, all, lower case", encode: eachByte("%%%02x")},
	{name: "JavaScript's escape()", encode: jsEscape},
	{name: "HTML", encode: html.EscapeString},
	{name: "HTML, named", encode: strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&apos;", "+", "&plus;", "/", "&sol;", "=", "&equals;").Replace},
	{name: "HTML, decimal", encode: eachRune("&#%d;")},
	{name: "HTML, hexadecimal", encode: eachRune("&#x%X;")},
	{name: "JSON", encode: inJSON},
	{name: "JSON of PHP", encode: func(s string) string { return strings.ReplaceAll(inJSON(s), "/", `\/`) }},
	{name: "JSON, ASCII", encode: func(s string) string { return unquoted(strconv.QuoteToASCII(s)) }},
	{name: "JSON, all", encode: eachUnit(`\u%04x`)},
	{name: "JSON, all, upper case", encode: eachUnit(`\u%04X`)},
	{name: "JavaScript, braces", encode: eachRune(`\u{%x}`)},
	{name: "Python, bytes", encode: eachByte(`\x%02x`)},
	{name: "Python, Latin-1", encode: latin1},
	{name: "Python, wide", encode: eachRune(`\U%08x`)},
	{name: "C, octal", encode: eachByte(`\%03o`)},
	{name: "base64", encode: func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }},
	{name: "base64, no padding", encode: func(s string) string { return base64.RawStdEncoding.EncodeToString([]byte(s)) }},
	{name: "base64url", encode: func(s string) string { return base64.URLEncoding.EncodeToString([]byte(s)) }},
	{name: "base64url, no padding", encode: func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }},
	{name: "base64 of credentials", encode: func(s string) string { return base64.StdEncoding.EncodeToString([]byte("cli:" + s)) }},
	{name: "base64 in lines", encode: inLines},
	{name: "base64 after a word", encode: func(s string) string { return "Basic_" + base64.StdEncoding.EncodeToString([]byte(s)) }},
	{name: "base64 of JavaScript's btoa()", encode: btoa},
	{name: "base64 in a path", encode: func(s string) string { return "v1/" + base64.RawURLEncoding.EncodeToString([]byte(s)) + "/token" }},
	{name: "capitals", encode: strings.ToUpper, beforeBase64: true},
	{name: "lower case", encode: strings.ToLower, beforeBase64: true},
}

func (e encoder) isBase64() bool { return strings.HasPrefix(e.name, "base64") }

func eachByte(format string) func(string) string {
	return func(s string) string {
		var out strings.Builder
		for i := range len(s) {
			fmt.Fprintf(&out, format, s[i])
		}
		return out.String()
	}
}

func eachRune(format string) func(string) string {
	return func(s string) string {
		var out strings.Builder
		for _, r := range s {
			fmt.Fprintf(&out, format, r)
		}
		return out.String()
	}
}

// eachUnit encodes each UTF-16 unit, as JSON and JavaScript do.
func eachUnit(format string) func(string) string {
	return func(s string) string {
		var out strings.Builder
		for _, unit := range utf16.Encode([]rune(s)) {
			fmt.Fprintf(&out, format, unit)
		}
		return out.String()
	}
}

func jsEscape(s string) string {
	var out strings.Builder
	for _, unit := range utf16.Encode([]rune(s)) {
		switch {
		case unit < 0x80 && (unicode.IsLetter(rune(unit)) || unicode.IsDigit(rune(unit)) || strings.ContainsRune("@*_+-./", rune(unit))):
			out.WriteRune(rune(unit))
		case unit < 0x100:
			fmt.Fprintf(&out, "%%%02X", unit)
		default:
			fmt.Fprintf(&out, "%%u%04X", unit)
		}
	}
	return out.String()
}

func inJSON(s string) string {
	quoted, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return unquoted(string(quoted))
}

func unquoted(s string) string { return s[1 : len(s)-1] }

// latin1 is Python's repr of a string, where \xe4 is a character.
func latin1(s string) string {
	var out strings.Builder
	for _, r := range s {
		switch {
		case r == '\\' || r == '\'':
			out.WriteString(`\` + string(r))
		case r < 0x7f:
			out.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&out, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			fmt.Fprintf(&out, `\U%08x`, r)
		}
	}
	return out.String()
}

// btoa encodes characters as bytes of Latin-1, if all of them are in it.
func btoa(s string) string {
	var bytes []byte
	for _, r := range s {
		if r > 0xff {
			return base64.StdEncoding.EncodeToString([]byte(s))
		}
		bytes = append(bytes, byte(r))
	}
	return base64.StdEncoding.EncodeToString(bytes)
}

// inLines is MIME's base64.
func inLines(s string) string {
	encoded := base64.StdEncoding.EncodeToString([]byte(s))
	var out strings.Builder
	for len(encoded) > 20 {
		out.WriteString(encoded[:20] + "\r\n")
		encoded = encoded[20:]
	}
	return out.String() + encoded
}

func TestEchoesAreWithheld(t *testing.T) {
	for _, secret := range []string{
		"canary-client-secret-7f3a",
		`se"cr/et+1 ü<&>='%41\x41 long enough`,
		"abcd1234",
		"k+/=9",
		"ÄÖÜäöüß€𝄞",
		"äöüß-ÄÖÜ",
		"Ã¤Ã¶Ã¼â\u20ac", // other characters if read as UTF-8
	} {
		r := New(secret)
		for _, outer := range encoders {
			for _, inner := range encoders {
				if outer.beforeBase64 && inner.isBase64() {
					continue
				}
				echo := outer.encode("no (" + inner.encode(secret) + ") here")
				if !r.Withholds("you sent " + echo + " to us") {
					t.Errorf("secret %q, %s in %s: %q is shown", secret, inner.name, outer.name, echo)
				}
			}
		}
		if r.Withholds("the audience is unknown") {
			t.Errorf("secret %q: an innocent text is withheld", secret)
		}
	}
}

// Half of the secret is too much if it has at least eight characters; one character less
// is not. See the package comment.
func TestWithholdsFromHalfOfTheSecret(t *testing.T) {
	const alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	letters := []rune("äöüéèêàáâñõãëïîìíòóôùúûýÿžšřčďťňæœøåðþßłđħıŧŋĸżźćśńąęįųėğşţ")
	for _, c := range []struct{ length, run int }{
		{1, 1}, {2, 2}, {7, 7}, {8, 8}, {9, 8}, {15, 8}, {16, 8}, {17, 9}, {18, 9}, {19, 10}, {40, 20}, {60, 30},
	} {
		for _, secret := range []string{alphabet[:c.length], string(letters[:min(c.length, len(letters))])} {
			runes := []rune(secret)
			r := New(secret)
			for start := 0; start+c.run <= len(runes); start++ {
				if echo := string(runes[start : start+c.run]); !r.Withholds("[" + echo + "]") {
					t.Errorf("%d characters, %d of them (%q): shown", c.length, c.run, echo)
				}
			}
			for start := 0; start+c.run-1 <= len(runes); start++ {
				if echo := string(runes[start : start+c.run-1]); r.Withholds("[" + echo + "]") {
					t.Errorf("%d characters, %d of them (%q): withheld", c.length, c.run-1, echo)
				}
			}
		}
	}
}

func TestEchoesSpreadOverTextsAreWithheld(t *testing.T) {
	r := New("canary-client-secret-7f3a")
	for _, texts := range [][]string{
		{"you sent canary-cl", "ient-secret-7f3a"},
		{"invalid canary", "-client", "-secret-7f3a"},
		{"no: Y2FuYXJ5LWNsaW", "VudC1zZWNyZXQtN2YzYQ=="},
		{"cana\x00ry-cli\u202eent-sec\tret"},
	} {
		if !r.Withholds(texts...) {
			t.Errorf("%q: shown", texts)
		}
	}
	// A backslash at the end of one text escapes the first character of the next.
	echo := "abcd1234"
	for range maxUndoings {
		echo = eachByte(`\x%02x`)(echo)
	}
	if !New("abcd1234").Withholds(`ends in \`, echo) {
		t.Error("an echo after a backslash: shown")
	}
	if r.Withholds("canary-clie", "-secret-7f3") {
		t.Error("two pieces that do not join: withheld")
	}
}

func TestPhrasesAreWithheld(t *testing.T) {
	for _, r := range []*Redactor{New("", "ask the other node"), New(strings.Repeat("0123456789", 40), "ask the other node")} {
		for _, text := range []string{
			"please ask the other node for it",
			"please Ask The OTHER Node for it",
			"please ask%20the+other%20node for it",
			"please ask the\x00 other node for it",
			"please " + base64.StdEncoding.EncodeToString([]byte("ask the other node")),
		} {
			if !r.Withholds(text) {
				t.Errorf("%q: shown", text)
			}
		}
		if r.Withholds("ask the other nod") {
			t.Error("part of a phrase: withheld")
		}
	}
}

func TestLine(t *testing.T) {
	for text, want := range map[string]string{
		"line\r\nend\x1b[31m\u0085\u2028": "lineend[31m",
		"left\u202eright":                 "leftright",
		"\xff ok":                         "\uFFFD ok",
		strings.Repeat("ä", 256):          strings.Repeat("ä", 256),
		strings.Repeat("ä", 257):          strings.Repeat("ä", 255) + "…",
	} {
		if got := Line(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

// Characters that differ only in case are equal, in whichever direction the case changed.
func TestFoldIgnoresCase(t *testing.T) {
	for r := rune(0); r <= unicode.MaxRune; r++ {
		one := fold(string(r))
		if up, low := fold(string(unicode.ToUpper(r))), fold(string(unicode.ToLower(r))); up != one || low != one {
			t.Errorf("%q: its upper case folds to %q, itself to %q, its lower case to %q", r, up, one, low)
		}
	}
}

// However a text of 64 KiB is built, reading it takes little time; one built to take long
// is withheld.
func TestReadingIsBounded(t *testing.T) {
	const size = 64 << 10
	secret := strings.Repeat("ab", 2<<10) // as long as any secret, and repetitive
	r := New(secret)
	fill := func(unit string) string { return strings.Repeat(unit, size/len(unit)+1)[:size] }
	noise := make([]byte, size)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = `%&\;0123456789abcdefux#+/`[random.IntN(25)]
	}
	for _, c := range []struct {
		name, text string
		withheld   bool
	}{
		{"prose", fill("The audience is not known to this server. "), false},
		{"percent", fill("%25"), false},
		{"open braces", fill(`\u{`), false},
		{"backslashes", fill(`\`), false},
		{"ampersands", fill("&"), false},
		{"entities", fill("&Aacute;&QUOT;"), false},
		{"long entity", "&" + fill("A") + ";", false},
		{"almost half the secret", fill(secret[:len(secret)/2-1] + "!"), false},
		{"half the secret", fill(secret[:len(secret)/2]), true},
		{"all encodings", fill(`%5Cu0026amp%3B&#37;\x25Jmx0Ow\u{26}%`), false},
		{"noise", string(noise), true},
	} {
		began := time.Now()
		withheld := r.Withholds(c.text)
		took := time.Since(began)
		t.Logf("%s: %s", c.name, took)
		if withheld != c.withheld {
			t.Errorf("%s: got withheld %v, want %v", c.name, withheld, c.withheld)
		}
		if took > 5*time.Second { // usually some milliseconds
			t.Errorf("%s: took %s", c.name, took)
		}
	}
}
