// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package lifetime is the arithmetic of a token's life: until when it is served, when
// the next one is due, when its readers should come back. Its functions are pure, over
// durations, and know no clock, no cache and no Vault. docs/concepts.md draws the same
// numbers as a picture.
package lifetime

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"strings"
	"time"
)

const (
	// maxFloor is the buffer MojoAuth's guide asks for: no token is handed
	// out in the last minute of its life.
	maxFloor = 60 * time.Second

	// maxMargin is how long before its token a lease ends, at most.
	maxMargin = 300 * time.Second

	// Assumed is taken for a token whose lifetime nothing tells: no
	// expires_in, no JWT exp, no max_ttl on the role.
	Assumed = 5 * time.Minute

	// Longest caps what a token endpoint may claim.
	Longest = 365 * 24 * time.Hour
)

// Schedule is what follows from a token's lifetime and from how much life its
// readers ask for. r, in the methods, is what is left of the token's life.
type Schedule struct {
	Lifetime time.Duration // L: from the mint until the token ends
	Floor    time.Duration // F: with this much left or less it is never served
	Margin   time.Duration // m: a lease ends this long before the token
	Refresh  time.Duration // R: with this much left or less a new one is due
}

// New derives the schedule of a token that lives for lifetime and whose
// readers want at least minTTL of it. minTTL is granted up to 0.8 of the
// lifetime: beyond that, each read would mint a token.
func New(lifetime, minTTL time.Duration) Schedule {
	return Schedule{
		Lifetime: lifetime,
		Floor:    min(maxFloor, lifetime/10),
		Margin:   min(maxMargin, lifetime/10),
		Refresh:  min(max(minTTL, lifetime/4), lifetime/5*4),
	}
}

// Ahead is with how much left the next token is asked for before a reader needs it:
// a little before one is due, by a random share of the lifetime from 1/100 to 1/20, so
// that tokens that were minted together are not renewed together. random is uniform in
// [0, 1), and is to be drawn once for each token.
func (s Schedule) Ahead(random float64) time.Duration {
	return s.Refresh + s.Lifetime/100 + Share(s.Lifetime/25, random)
}

// Phase is where in its life a token is.
type Phase int

// The phases of a token's life, in order.
const (
	Fresh Phase = iota // serve it
	Due                // serve it if need be; a new one is due
	Spent              // never serve it
)

// Phase says what may be done with a token that has r left.
func (s Schedule) Phase(r time.Duration) Phase {
	switch {
	case r > s.Refresh:
		return Fresh
	case r > s.Floor:
		return Due
	default:
		return Spent
	}
}

// TTL is how many seconds a reader should let pass before reading again: until
// a new token is due, plus a random share of half the way from there to the
// margin, so that readers of one role do not come back in the same second.
// random is uniform in [0, 1). The result is whole seconds and at least 1:
// Vault Agent reads a ttl of 0 every second and takes a Share for no ttl.
func (s Schedule) TTL(r time.Duration, random float64) int64 {
	jitter := max(0, (s.Refresh-s.Margin)/2)
	return WholeSeconds(r - s.Refresh + Share(jitter, random))
}

// Lease is how long a lease on a token with r left lasts. It is never below a
// second, because Vault takes 0 and less for its default of 32 days.
func (s Schedule) Lease(r time.Duration) time.Duration {
	return max(time.Second, r-s.Margin)
}

// RotationPeriod is how many whole seconds lie between two mints for a token
// that is in use.
func (s Schedule) RotationPeriod() int64 {
	return WholeSeconds(s.Lifetime - s.Refresh)
}

// StaleWait is how long a reader who got an old token, because no new one
// could be had, should let pass before asking again: 30 s to 60 s, but no more
// than half of what is left, and never below a second.
func StaleWait(r time.Duration, random float64) time.Duration {
	const shortest, longest = 30 * time.Second, 60 * time.Second
	return max(time.Second, min(shortest+Share(longest-shortest, random), r/2))
}

// WholeSeconds rounds d down to seconds, but not below 1.
func WholeSeconds(d time.Duration) int64 {
	return max(1, int64(d/time.Second))
}

// Share is a random share of d: random is uniform in [0, 1).
func Share(d time.Duration, random float64) time.Duration {
	return time.Duration(float64(d) * random)
}

// Told is what the answer of the token endpoint says of a token's
// lifetime, counted from mintedAt: expiresIn (0 when absent), or the token's
// own exp when it is a JWT and that comes sooner or stands alone. The exp is
// not verified, so it may shorten but never lengthen. 0 means that neither
// tells; a negative result, that the token has already ended.
func Told(expiresIn time.Duration, accessToken string, mintedAt time.Time) time.Duration {
	told := expiresIn
	if exp, ok := JWTExpiry(accessToken); ok {
		left := exp.Sub(mintedAt)
		if left <= 0 {
			return -1
		}
		if told == 0 || left < told {
			told = left
		}
	}
	return min(told, Longest)
}

// Effective is L: what the answer told, capped by the role's max_ttl.
// A token whose lifetime nobody tells gets max_ttl, or Assumed.
func Effective(told, maxTTL time.Duration) time.Duration {
	switch {
	case told <= 0 && maxTTL <= 0:
		return Assumed
	case told <= 0:
		return min(maxTTL, Longest)
	case maxTTL <= 0:
		return told
	default:
		return min(told, maxTTL)
	}
}

// JWTExpiry reads the exp claim (RFC 7519 §4.1.4) of a token that looks like a
// signed JWT, without verifying it: only the API that the token is for can.
func JWTExpiry(token string) (time.Time, bool) {
	header, rest, ok := strings.Cut(token, ".")
	if !ok || header == "" {
		return time.Time{}, false
	}
	payload, signature, ok := strings.Cut(rest, ".")
	if !ok || strings.Contains(signature, ".") {
		return time.Time{}, false
	}
	raw, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return time.Time{}, false
	}
	var claims struct {
		Exp *float64 `json:"exp"`
	}
	if err := json.Unmarshal(raw, &claims); err != nil || claims.Exp == nil {
		return time.Time{}, false
	}
	// Beyond this, seconds no longer fit a time.Time's arithmetic; whatever
	// such a claim means, it does not shorten a life.
	if *claims.Exp > math.MaxInt32*1000.0 {
		return time.Time{}, false
	}
	if *claims.Exp < 0 {
		return time.Unix(0, 0), true
	}
	whole, part := math.Modf(*claims.Exp)
	return time.Unix(int64(whole), int64(part*1e9)), true
}
