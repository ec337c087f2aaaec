// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package redact

import (
	"math/rand/v2"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// FuzzEchoes searches for a combination of encodings that shows too much of a secret.
// recipe chooses the piece of the secret, and up to five encodings with the text around
// them.
func FuzzEchoes(f *testing.F) {
	f.Add("canary-client-secret-7f3a", []byte{0, 2, 16, 2}, "you sent", "to us")
	f.Add(`se"cr/et+1 ü<&>='%41\x41`, []byte{3, 10, 6, 11, 1, 20}, `\`, "%")
	f.Add("abc", []byte{0, 25, 20, 21, 22, 23}, "", "")
	f.Add("ÄÖÜäöüß€𝄞", []byte{1, 5, 17, 27, 9}, "&", ";")
	f.Fuzz(func(t *testing.T, secret string, recipe []byte, before, after string) {
		if len(before)+len(after) > 1<<10 {
			t.Skip("too slow")
		}
		if !utf8.ValidString(secret) || secret == "" || len(secret) > 200 || strings.ContainsFunc(secret, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Skip("no secret")
		}
		r := New(secret)
		echo, encodings := follow(recipe, pick(secret, r.run, recipe))
		text := before + " " + echo + " " + after
		if !r.Withholds(text) {
			t.Errorf("secret %q, %d characters of it encoded by %q: %q is shown", secret, r.run, encodings, text)
		}
		half := len(echo) / 2
		if !r.Withholds(before+" "+echo[:half], echo[half:]+" "+after) {
			t.Errorf("secret %q, %d characters of it encoded by %q: %q is shown when split over two texts", secret, r.run, encodings, text)
		}
	})
}

// FuzzNoOracle searches for a text that is withheld or not depending on whether eight
// characters in it are the secret's. Someone who can make the server repeat it could use
// it to guess the secret.
func FuzzNoOracle(f *testing.F) {
	f.Add(uint64(1), []byte{5, 0}, "the audience", "is unknown")
	f.Add(uint64(2), []byte{1, 16, 2, 10}, "client_id=", "&scope=a")
	f.Add(uint64(3), []byte{0, 20, 20, 20, 20, 20}, strings.Repeat("x", 300), "%41\\x41&#65;")
	f.Fuzz(func(t *testing.T, seed uint64, recipe []byte, before, after string) {
		if len(before)+len(after) > 1<<10 {
			t.Skip("too slow")
		}
		random := rand.New(rand.NewPCG(seed, 0))
		length := 15 + random.IntN(80) // 17 with the keys below
		secret, other := randomSecret(random, length), randomSecret(random, length)
		piece := pick(secret, 8, recipe)
		// The character next to the eight, perhaps part of an encoding, must not happen
		// to be a ninth: nine would be half of the secret, and rightly withheld.
		secret = strings.Replace(secret, piece, "🗝"+piece+"🗝", 1)
		echo, encodings := follow(recipe, piece)
		text := before + echo + after
		if with, without := New(secret).Withholds(text), New(other+"🗝🗝").Withholds(text); with != without {
			t.Errorf("%d characters, 8 of them encoded by %q: %q is withheld: %v; if they are not the secret's: %v", length, encodings, text, with, without)
		}
	})
}

// pick returns a run of the given length from the secret. The recipe chooses where.
func pick(secret string, run int, recipe []byte) string {
	runes := []rune(secret)
	start := 0
	if len(recipe) > 0 {
		start = int(recipe[0]) % (len(runes) - run + 1)
	}
	return string(runes[start : start+run])
}

// follow encodes text as the recipe specifies.
func follow(recipe []byte, text string) (encoded string, names []string) {
	around := []string{"", " ", "'", "(no) ", "id:", `{"a":`}
	inBase64 := false
	for i := 1; i < len(recipe) && len(names) < maxUndoings; i++ {
		e := encoders[int(recipe[i])%len(encoders)]
		if inBase64 && e.beforeBase64 {
			continue
		}
		inBase64 = inBase64 || e.isBase64()
		wrap := around[int(recipe[i])/len(encoders)%len(around)]
		text = e.encode(wrap + text)
		names = append(names, e.name)
		if len(text) > 4<<10 {
			break
		}
	}
	return text, names
}

func randomSecret(random *rand.Rand, length int) string {
	alphabet := []rune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:@/?\"\\<>%# äß€")
	secret := make([]rune, length)
	for i := range secret {
		secret[i] = alphabet[random.IntN(len(alphabet))]
	}
	return string(secret)
}
