// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package lifetime is the arithmetic of a token's lifetime: how long it is served, when
// the next one is due, and when its readers should return. Its functions are pure, work
// on durations, and know no clock, cache, or Vault. docs/concepts.md explains the same
// numbers.
package lifetime

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"strings"
	"time"
)

const (
	// maxFloor is the buffer that MojoAuth's guide recommends: no token is served in the
	// last minute of its lifetime.
	maxFloor = 60 * time.Second

	// maxMargin is how long before its token a lease ends, at most.
	maxMargin = 300 * time.Second

	// Assumed is the lifetime of a token for which none is known: no expires_in, no JWT
	// exp, and no max_ttl on the role.
	Assumed = 5 * time.Minute

	// Longest caps the lifetime that a token endpoint may claim.
	Longest = 365 * 24 * time.Hour
)

// Schedule is what follows from a token's lifetime and from how much time its readers
// want left. In its methods, r is the token's time left.
type Schedule struct {
	Lifetime time.Duration // L: from the mint until the token expires
	Floor    time.Duration // F: with this much left or less, the token is never served
	Margin   time.Duration // m: a lease ends this long before the token expires
	Refresh  time.Duration // R: with this much left or less, the token is due for renewal
}

// New returns the schedule of a token with that lifetime whose readers want at least
// minTTL left. It grants minTTL up to 0.8 of the lifetime: with more, each read would
// mint a token.
func New(lifetime, minTTL time.Duration) Schedule {
	return Schedule{
		Lifetime: lifetime,
		Floor:    min(maxFloor, lifetime/10),
		Margin:   min(maxMargin, lifetime/10),
		Refresh:  min(max(minTTL, lifetime/4), lifetime/5*4),
	}
}

// Ahead is the time left at which the next token is requested, shortly before the current
// one is due. The difference is a random share of the lifetime from 1/100 to 1/20, so
// tokens that were minted together are not renewed together. random is uniform in [0, 1)
// and must be drawn once per token.
func (s Schedule) Ahead(random float64) time.Duration {
	return s.Refresh + s.Lifetime/100 + Share(s.Lifetime/25, random)
}

// Phase is a phase of a token's lifetime.
type Phase int

// The phases of a token's lifetime, in order.
const (
	Fresh Phase = iota // serve it
	Due                // serve it if necessary; it is due for renewal
	Spent              // never serve it
)

// Phase returns the phase of a token with r left.
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

// TTL is how many seconds a reader should wait before it reads again: until the token is
// due, plus a random share of half the time from there to the margin, so readers of one
// role do not return in the same second. random is uniform in [0, 1). The result is whole
// seconds and at least 1: Vault Agent reads a ttl of 0 every second and treats a fraction
// as no ttl.
func (s Schedule) TTL(r time.Duration, random float64) int64 {
	jitter := max(0, (s.Refresh-s.Margin)/2)
	return WholeSeconds(r - s.Refresh + Share(jitter, random))
}

// Lease is the duration of a lease on a token with r left. It is at least a second,
// because Vault replaces 0 and less with its default of 32 days.
func (s Schedule) Lease(r time.Duration) time.Duration {
	return max(time.Second, r-s.Margin)
}

// RotationPeriod is the number of whole seconds between two mints for a token in use.
func (s Schedule) RotationPeriod() int64 {
	return WholeSeconds(s.Lifetime - s.Refresh)
}

// StaleWait is how long a reader that got an old token, because no new one was available,
// should wait before it reads again: 30 s to 60 s, but at most half of the time left and
// at least a second.
func StaleWait(r time.Duration, random float64) time.Duration {
	const shortest, longest = 30 * time.Second, 60 * time.Second
	return max(time.Second, min(shortest+Share(longest-shortest, random), r/2))
}

// WholeSeconds rounds d down to seconds, but not below 1.
func WholeSeconds(d time.Duration) int64 {
	return max(1, int64(d/time.Second))
}

// Share returns a random share of d; random is uniform in [0, 1).
func Share(d time.Duration, random float64) time.Duration {
	return time.Duration(float64(d) * random)
}

// Reported is the lifetime according to the token endpoint's answer, counted from mintedAt:
// expiresIn (0 if absent), or the exp claim of a JWT if that is sooner or stands alone.
// The claim is not verified, so it can shorten the lifetime but not extend it. 0 means
// unknown; a negative result means that the token has already expired.
func Reported(expiresIn time.Duration, accessToken string, mintedAt time.Time) time.Duration {
	reported := expiresIn
	if exp, ok := JWTExpiry(accessToken); ok {
		left := exp.Sub(mintedAt)
		if left <= 0 {
			return -1
		}
		if reported == 0 || left < reported {
			reported = left
		}
	}
	return min(reported, Longest)
}

// Effective is L: the lifetime in the answer, capped by the role's max_ttl. A token
// without a known lifetime gets max_ttl, or Assumed.
func Effective(reported, maxTTL time.Duration) time.Duration {
	switch {
	case reported <= 0 && maxTTL <= 0:
		return Assumed
	case reported <= 0:
		return min(maxTTL, Longest)
	case maxTTL <= 0:
		return reported
	default:
		return min(reported, maxTTL)
	}
}

// JWTExpiry reads the exp claim (RFC 7519 §4.1.4) of a token that looks like a signed
// JWT. It does not verify the token: only the API that the token is for can.
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
	// Larger values overflow the arithmetic of time.Time. Such a claim shortens no
	// lifetime.
	if *claims.Exp > math.MaxInt32*1000.0 {
		return time.Time{}, false
	}
	if *claims.Exp < 0 {
		return time.Unix(0, 0), true
	}
	whole, part := math.Modf(*claims.Exp)
	return time.Unix(int64(whole), int64(part*1e9)), true
}
