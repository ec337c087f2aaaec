// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Command vault-plugin-secrets-mojoauth is the plugin as Vault runs it. Started
// by hand it does nothing but print its version, with -version.
package main

import (
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	mojoauth "github.com/mojoauth/vault-plugin-secrets-mojoauth"
)

func main() {
	if len(os.Args) == 2 && (os.Args[1] == "-version" || os.Args[1] == "--version") {
		fmt.Println(mojoauth.VersionString())
		return
	}

	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(os.Args[1:]); err != nil {
		fatal(err)
	}
	silenceStandardLogger()
	defer runtime.KeepAlive(tuneGC())
	go endWithVault(os.Getppid())

	// Multiplexed: the mounts of one plugin version share a process.
	err := plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: mojoauth.Factory,
		// Vaults before 1.11 hand TLS over themselves; newer ones ignore it.
		TLSProviderFunc: api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
	if err != nil {
		fatal(err)
	}
}

// silenceStandardLogger keeps what Go's net/http prints out of Vault's log, where all
// that a plugin writes to stderr ends up: bytes that a token endpoint sends unasked,
// which may hold the client secret, and with GODEBUG=http2debug=2 whole requests.
// Nothing of ours is lost: hclog has a writer of its own, through which the plugin
// and go-plugin tell Vault what there is to tell, and what ends the process (a panic,
// fatal) is not printed by this logger.
func silenceStandardLogger() { log.SetOutput(io.Discard) }

// tuneGC has the garbage collector run rarely while the plugin holds little, when
// what it collects is what gRPC leaves of each request, and often enough when it
// holds thousands of tokens not to double them. The operator's own GOGC goes
// before. It returns what has to be kept alive: memory that counts as held, but is
// never touched, so that it takes none of the machine's unless Vault locks memory.
func tuneGC() []byte {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(50)
	return make([]byte, 16<<20)
}

// endWithVault ends the process once the one that started it has gone without telling,
// as by kill -9: what is left would keep secrets in memory, and renew tokens, for
// nobody. Where a process keeps its parent's id (Windows), nothing happens.
func endWithVault(vault int) {
	for range time.Tick(time.Second) {
		if os.Getppid() != vault {
			os.Exit(1)
		}
	}
}

func fatal(err error) {
	hclog.New(&hclog.LoggerOptions{}).Error("plugin shutting down", "error", err)
	os.Exit(1)
}
