// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package redact

import (
	"encoding/base64"
	"html"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// This file undoes encodings anywhere in a text and leaves everything else as it is. It
// is lenient: someone may be able to read what a strict decoder refuses. Letters match in
// either case, because an encoded text may have been converted to upper case.

// undoings returns, for each known encoding, what text becomes when it is undone. Decoded
// texts shorter than shortest bytes may be omitted.
func undoings(text string, shortest int) []string {
	return []string{
		percent(text, asCharacter),
		percent(text, asByte),
		entities(text),
		escapes(text, asCharacter),
		escapes(text, asByte),
		base64Runs(text, shortest),
	}
}

// percent undoes RFC 3986 §2.1, where %E4 is a byte of UTF-8, and JavaScript's escape(),
// where %E4 is a character and others are %u20AC.
func percent(text string, small func(rune) string) string {
	return undo(text, '%', func(rest string) (string, int) {
		if r, size := utf16Escape(rest, '%'); size > 0 {
			return string(r), size
		}
		if r, ok := hex(rest, 0, 2); ok {
			return small(r), 2
		}
		return "%", 0
	})
}

// entities undoes the character references of HTML and XML.
func entities(text string) string {
	if !strings.Contains(text, "&") {
		return text
	}
	known := namedEntity.ReplaceAllStringFunc(text, func(entity string) string {
		if html.UnescapeString(entity) == entity {
			return strings.ToLower(entity)
		}
		return entity
	})
	return html.UnescapeString(known)
}

var namedEntity = regexp.MustCompile(`&[A-Za-z]+;`)

// escapes undoes the backslashes of JSON, JavaScript, Python, Go, and C. The languages
// disagree on whether \xE4 and \344 are a byte of UTF-8 or a character.
func escapes(text string, small func(rune) string) string {
	return undo(text, '\\', func(rest string) (string, int) {
		if r, size := wideEscape(rest); size > 0 {
			return string(r), size
		}
		if r, ok := hex(rest, 1, 2); ok && startsWith(rest, 'x') {
			return small(r), 3
		}
		if r, size := octal(rest); size > 0 {
			return small(r), size
		}
		switch {
		case rest == "":
			return `\`, 0
		case strings.ContainsRune("abfnrtvABFNRTV", rune(rest[0])): // control characters
			return "", 1
		default:
			return rest[:1], 1
		}
	})
}

func asByte(r rune) string      { return string([]byte{byte(r & 0xff)}) }
func asCharacter(r rune) string { return string(r) }

// wideEscape reads what follows a backslash as one of u{2F}, x{2F}, U0000002F, and u002F.
// The size is 0 if it is none of them.
func wideEscape(rest string) (r rune, size int) {
	if end := strings.IndexByte(rest[:min(len("u{0010FFFF}"), len(rest))], '}'); end > 2 && rest[1] == '{' {
		if r, ok := hex(rest, 2, end-2); ok && (startsWith(rest, 'u') || startsWith(rest, 'x')) {
			return r, end + 1
		}
	}
	if r, ok := hex(rest, 1, 8); ok && startsWith(rest, 'u') {
		return r, 9
	}
	return utf16Escape(rest, '\\')
}

// utf16Escape reads u002F, which follows a mark, or two of them that form one character
// (a surrogate pair). The size is 0 if it is neither.
func utf16Escape(rest string, mark byte) (r rune, size int) {
	const length = len("u002F")
	r, ok := hex(rest, 1, 4)
	if !ok || !startsWith(rest, 'u') {
		return 0, 0
	}
	if utf16.IsSurrogate(r) && len(rest) > length && rest[length] == mark {
		low, ok := hex(rest[length+1:], 1, 4)
		if pair := utf16.DecodeRune(r, low); ok && pair != utf8.RuneError {
			return pair, 2*length + 1
		}
	}
	return r, length
}

// startsWith reports whether text starts with the letter in either case.
func startsWith(text string, letter byte) bool { return text != "" && text[0]|0x20 == letter }

// octal reads up to three octal digits that form a byte.
func octal(rest string) (r rune, size int) {
	for size < min(3, len(rest)) && '0' <= rest[size] && rest[size] <= '7' && r*8 < 256 {
		r = r*8 + rune(rest[size]-'0')
		size++
	}
	return r, size
}

// base64Runs decodes each stretch of base64 characters, of either alphabet, from each of
// the four offsets at which a group may begin: what precedes the base64 often belongs to
// its alphabet too. It omits the rest of the text, because what was encoded as a whole is
// in one stretch.
func base64Runs(text string, shortest int) string {
	var out strings.Builder
	for stretch := range strings.FieldsFuncSeq(text, func(r rune) bool { return !isBase64(r) }) {
		if len(stretch) < (shortest*4+2)/3 {
			continue
		}
		stretch = urlAlphabet.Replace(stretch)
		for offset := range 4 {
			group := stretch[min(offset, len(stretch)):]
			if len(group)%4 == 1 {
				group = group[:len(group)-1] // six bits are not a byte
			}
			decoded, err := base64.RawStdEncoding.DecodeString(group)
			if err == nil {
				out.Write(decoded)
				out.WriteByte(' ')
			}
		}
	}
	return out.String()
}

var urlAlphabet = strings.NewReplacer("-", "+", "_", "/")

func isBase64(r rune) bool {
	return 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || strings.ContainsRune("+/-_", r)
}

// undo replaces each mark in text, and as much of what follows as read consumes, with the
// result of read.
func undo(text string, mark byte, read func(rest string) (decoded string, size int)) string {
	if strings.IndexByte(text, mark) < 0 {
		return text
	}
	var out strings.Builder
	for {
		i := strings.IndexByte(text, mark)
		if i < 0 {
			out.WriteString(text)
			return out.String()
		}
		out.WriteString(text[:i])
		decoded, size := read(text[i+1:])
		out.WriteString(decoded)
		text = text[i+1+size:]
	}
}

// hex reads the digits of text from start on as the number of a character.
func hex(text string, start, digits int) (r rune, ok bool) {
	if len(text) < start+digits {
		return 0, false
	}
	n, err := strconv.ParseUint(text[start:start+digits], 16, 32)
	if err != nil || n > utf8.MaxRune {
		return 0, false
	}
	return rune(n), true
}
